"""How tests start processes that need what takes seconds to import: forked from a process that has imported it.

Not from the one that runs the tests: what a library's threads (OpenMP's for one) were at is never finished in a fork.
"""

import multiprocessing


CONTEXT = multiprocessing.get_context("forkserver")
# Modules beside this one would not be found.
CONTEXT.set_forkserver_preload(["dynammo_peft", "transformers.models.vit.modeling_vit", "accelerate.tracking"])
