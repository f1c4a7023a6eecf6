"""``python -m tinker_custom_loss.port``: see :mod:`.worker`."""

import gc
import sys

if __name__ == "__main__":
    # A tenth of the start is to look for garbage among what is imported, which stays for good.
    gc.disable()
    from .worker import main

    gc.freeze()
    gc.enable()
    main(sys.argv[1:])
