"""What a schedule costs: discrete-event simulation of its program.

Knows `sched`, and neither torch nor `exec`.
"""

from pipeproof.sim.bound import Bounds as Bounds
from pipeproof.sim.bound import bounds as bounds
from pipeproof.sim.bound import lower_bound as lower_bound
from pipeproof.sim.cluster import Cluster as Cluster
from pipeproof.sim.cluster import Link as Link
from pipeproof.sim.cost import Cost as Cost
from pipeproof.sim.cost_file import Measured as Measured
from pipeproof.sim.cost_file import read_cost as read_cost
from pipeproof.sim.cost_file import write_cost as write_cost
from pipeproof.sim.engine import DeadlockError as DeadlockError
from pipeproof.sim.fit import Fit as Fit
from pipeproof.sim.fit import fit as fit
from pipeproof.sim.jitter import Jitter as Jitter
from pipeproof.sim.jitter import jitter as jitter
from pipeproof.sim.layers import cost_of_layers as cost_of_layers
from pipeproof.sim.many import Batch as Batch
from pipeproof.sim.many import simulate_many as simulate_many
from pipeproof.sim.predict import simulate as simulate
from pipeproof.sim.presets import PRESETS as PRESETS
from pipeproof.sim.presets import Preset as Preset
from pipeproof.sim.presets import preset as preset
from pipeproof.sim.profile import cost_of as cost_of
from pipeproof.sim.profile import links_of as links_of
from pipeproof.sim.sensitivity import Sensitivity as Sensitivity
from pipeproof.sim.sensitivity import sensitivity as sensitivity
from pipeproof.sim.slack import slack as slack
from pipeproof.sim.sweep import grid as grid
from pipeproof.sim.sweep import sweep as sweep
from pipeproof.sim.transformer import MODELS as MODELS
from pipeproof.sim.transformer import Transformer as Transformer
