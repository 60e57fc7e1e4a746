"""What a schedule costs: discrete-event simulation of its program.

Knows `sched`, and neither torch nor `exec`.
"""

from pipeproof.sim.bound import lower_bound as lower_bound
from pipeproof.sim.cluster import Cluster as Cluster
from pipeproof.sim.cluster import Link as Link
from pipeproof.sim.cost import Cost as Cost
from pipeproof.sim.engine import DeadlockError as DeadlockError
from pipeproof.sim.predict import simulate as simulate
