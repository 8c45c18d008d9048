"""Public operations. Each stem's file checks its arguments, chooses an implementation and registers what kernels need."""

from stattn.ops.attention import attention, explain, merge
from stattn.ops.select import top_k, top_p

__all__ = ["attention", "explain", "merge", "top_k", "top_p"]
