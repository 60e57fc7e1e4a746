"""Generators: one pure function per published schedule."""

from pipeproof.sched.gen.bidirectional import chimera as chimera
from pipeproof.sched.gen.bidirectional import dualpipe as dualpipe
from pipeproof.sched.gen.bidirectional import gems as gems
from pipeproof.sched.gen.gpipe import gpipe as gpipe
from pipeproof.sched.gen.naive import naive as naive
from pipeproof.sched.gen.one_f_one_b import one_f_one_b as one_f_one_b
from pipeproof.sched.gen.v_shape import dualpipe_v as dualpipe_v
from pipeproof.sched.gen.v_shape import v_half as v_half
from pipeproof.sched.gen.v_shape import v_min as v_min
from pipeproof.sched.gen.v_shape import zb_v as zb_v
from pipeproof.sched.gen.wave import hanayo as hanayo

__all__ = [
    "chimera",
    "dualpipe",
    "dualpipe_v",
    "gems",
    "gpipe",
    "hanayo",
    "naive",
    "one_f_one_b",
    "v_half",
    "v_min",
    "zb_v",
]
