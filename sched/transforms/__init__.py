"""Schedule → Schedule: pure functions, each in its file."""

from pipeproof.sched.transforms.backward import BackwardOrder as BackwardOrder
from pipeproof.sched.transforms.backward import merge_backward as merge_backward
from pipeproof.sched.transforms.backward import reorder_backward as reorder_backward
from pipeproof.sched.transforms.backward import split_backward as split_backward
from pipeproof.sched.transforms.recompute import POLICIES as POLICIES
from pipeproof.sched.transforms.recompute import Policy as Policy
from pipeproof.sched.transforms.recompute import recompute as recompute
from pipeproof.sched.transforms.reduce import reduce_gradients as reduce_gradients
from pipeproof.sched.transforms.resize import with_micro_batches as with_micro_batches
from pipeproof.sched.transforms.retime import retime as retime
from pipeproof.sched.transforms.step import with_steps as with_steps
