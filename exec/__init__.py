"""Running a schedule on real devices, with torch.

Knows `sched` and torch, never `sim`.
"""

from pipeproof.exec.allocator import keep_memory as keep_memory
from pipeproof.exec.batch import Whole as Whole
from pipeproof.exec.batch_norm import defer_batch_norm as defer_batch_norm
from pipeproof.exec.errors import BatchError as BatchError
from pipeproof.exec.errors import LossError as LossError
from pipeproof.exec.errors import ModelError as ModelError
from pipeproof.exec.errors import RankError as RankError
from pipeproof.exec.errors import StepError as StepError
from pipeproof.exec.examples import EXAMPLES as EXAMPLES
from pipeproof.exec.examples import Example as Example
from pipeproof.exec.group import Ranks as Ranks
from pipeproof.exec.launch import launch as launch
from pipeproof.exec.layer_profile import profile_layers as profile_layers
from pipeproof.exec.measure import ActivationMeter as ActivationMeter
from pipeproof.exec.partition import split_at as split_at
from pipeproof.exec.partition import split_evenly as split_evenly
from pipeproof.exec.pipeline import Pipeline as Pipeline
from pipeproof.exec.profile import Profile as Profile
from pipeproof.exec.profile import profile as profile
from pipeproof.exec.reference import reference as reference
from pipeproof.exec.tracing import trace as trace
