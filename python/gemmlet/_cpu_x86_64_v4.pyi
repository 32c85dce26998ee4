from ._cpu_baseline import *
