"""Generators: one pure function per published schedule."""

from pipeproof.sched.gen.gpipe import gpipe as gpipe
from pipeproof.sched.gen.naive import naive as naive
from pipeproof.sched.gen.one_f_one_b import one_f_one_b as one_f_one_b

__all__ = ["gpipe", "naive", "one_f_one_b"]
