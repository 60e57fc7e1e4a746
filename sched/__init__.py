"""What a schedule is: write it, check it, lower it to device programs.

Knows neither torch nor simpy.
"""

from pipeproof.sched import catalog as catalog
from pipeproof.sched.catalog import CATALOG as CATALOG
from pipeproof.sched.certificate import Certificate as Certificate
from pipeproof.sched.certificate import Refutation as Refutation
from pipeproof.sched.check import check as check
from pipeproof.sched.errors import ParameterError as ParameterError
from pipeproof.sched.errors import ParseError as ParseError
from pipeproof.sched.errors import PipeproofError as PipeproofError
from pipeproof.sched.errors import ScheduleError as ScheduleError
from pipeproof.sched.errors import UnsupportedError as UnsupportedError
from pipeproof.sched.findings import Finding as Finding
from pipeproof.sched.findings import Report as Report
from pipeproof.sched.fit_recompute import Recomputation as Recomputation
from pipeproof.sched.fit_recompute import fit_recompute as fit_recompute
from pipeproof.sched.fit_recompute import fit_selective as fit_selective
from pipeproof.sched.fits import fits as fits
from pipeproof.sched.instructions import Action as Action
from pipeproof.sched.instructions import BufferKind as BufferKind
from pipeproof.sched.ir import B as B
from pipeproof.sched.ir import F as F
from pipeproof.sched.ir import I as I
from pipeproof.sched.ir import Kind as Kind
from pipeproof.sched.ir import Op as Op
from pipeproof.sched.ir import Ops as Ops
from pipeproof.sched.ir import R as R
from pipeproof.sched.ir import Schedule as Schedule
from pipeproof.sched.ir import W as W
from pipeproof.sched.ir import alternate as alternate
from pipeproof.sched.ir import op as op
from pipeproof.sched.ir import overlap as overlap
from pipeproof.sched.layers import Layer as Layer
from pipeproof.sched.layers import Memory as Memory
from pipeproof.sched.lower import lower as lower
from pipeproof.sched.partition import Partition as Partition
from pipeproof.sched.partition import partition as partition
from pipeproof.sched.placement import Placement as Placement
from pipeproof.sched.program import Program as Program
from pipeproof.sched.prove import prove as prove
from pipeproof.sched.trace import Trace as Trace
from pipeproof.sched.transforms import POLICIES as POLICIES
from pipeproof.sched.transforms import merge_backward as merge_backward
from pipeproof.sched.transforms import recompute as recompute
from pipeproof.sched.transforms import reduce_gradients as reduce_gradients
from pipeproof.sched.transforms import reorder_backward as reorder_backward
from pipeproof.sched.transforms import retime as retime
from pipeproof.sched.transforms import split_backward as split_backward
from pipeproof.sched.transforms import with_micro_batches as with_micro_batches
from pipeproof.sched.transforms import with_steps as with_steps
