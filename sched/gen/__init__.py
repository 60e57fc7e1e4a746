"""Generators: one pure function per published schedule."""

from pipeproof.sched.gen.bidirectional import chimera as chimera
from pipeproof.sched.gen.bidirectional import gems as gems
from pipeproof.sched.gen.bpipe import bpipe as bpipe
from pipeproof.sched.gen.building_block import v_half as v_half
from pipeproof.sched.gen.building_block import v_min as v_min
from pipeproof.sched.gen.dualpipe import dualpipe as dualpipe
from pipeproof.sched.gen.dualpipe import dualpipe_v as dualpipe_v
from pipeproof.sched.gen.eager import eager_1f1b as eager_1f1b
from pipeproof.sched.gen.gpipe import gpipe as gpipe
from pipeproof.sched.gen.interleaved import interleaved as interleaved
from pipeproof.sched.gen.looped_bfs import looped_bfs as looped_bfs
from pipeproof.sched.gen.naive import naive as naive
from pipeproof.sched.gen.one_f_one_b import one_f_one_b as one_f_one_b
from pipeproof.sched.gen.pipe_offload import pipeoffload as pipeoffload
from pipeproof.sched.gen.sliced import seq1f1b as seq1f1b
from pipeproof.sched.gen.sliced import slimpipe as slimpipe
from pipeproof.sched.gen.sliced import terapipe as terapipe
from pipeproof.sched.gen.wave import hanayo as hanayo
from pipeproof.sched.gen.zb_v import zb_v as zb_v
from pipeproof.sched.gen.zero_bubble import zb_h1 as zb_h1
from pipeproof.sched.gen.zero_bubble import zb_h2 as zb_h2

__all__ = [
    "bpipe",
    "chimera",
    "dualpipe",
    "dualpipe_v",
    "eager_1f1b",
    "gems",
    "gpipe",
    "hanayo",
    "interleaved",
    "looped_bfs",
    "naive",
    "one_f_one_b",
    "pipeoffload",
    "seq1f1b",
    "slimpipe",
    "terapipe",
    "v_half",
    "v_min",
    "zb_h1",
    "zb_h2",
    "zb_v",
]
