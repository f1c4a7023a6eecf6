"""A script that ends while its training client computes a step, with a call behind it.

Arguments: the sandbox's URL, and whether the term ``sleeps`` or is ``busy``.
"""

import sys
import threading
import time

import tinker

from tinker_custom_loss import with_regularizers
from training import ADAM, datums, squares

reached = threading.Event()


def never_returns(data, logprobs):
    reached.set()
    while True:
        squares(data, logprobs)
        time.sleep(60 if sys.argv[2] == "sleeps" else 0)


service = tinker.ServiceClient(base_url=sys.argv[1], api_key="tml-sandbox")
client = service.create_lora_training_client("any-model")
client = with_regularizers(client.result() if isinstance(client, tinker.APIFuture) else client)
client.forward_backward_custom(datums(), None, [{"fn": never_returns, "weight": 1.0}])
client.optim_step(ADAM)
assert reached.wait(60)
print(time.time(), flush=True)
