"""One step whose base loss is the server's own, driven here: its pass, then the regularizers'."""

from __future__ import annotations

import concurrent.futures
import math
import time
from collections.abc import Callable
from typing import Any

from tinker import APIFuture, Datum, ForwardBackwardOutput

from ..record import RegularizerRecord, StepRecord, metrics_of
from . import sdk
from .futures import StepFuture, concurrent_future, settle
from .step import Step, StepOutput

__all__ = ["NativeStep", "native_data"]


def native_data(data: list[Datum], loss_fn: str) -> list[Datum]:
    """What of ``data`` the server's loss takes: the terms' own arrays stay here.

    The server refuses keys that its loss does not know. What the loss is not known to take is
    sent as it is.
    """
    known = sdk.LOSS_INPUTS.get(loss_fn)
    return data if known is None else [sdk.with_inputs_of(datum, known) for datum in data]


class NativeStep(Step):
    """The call of the loop as it is, and one linear pass that adds the regularizers' gradient.

    The regularizers see the logprobs that the call returns, so there is no forward pass of
    theirs. A gradient that is zero everywhere is not sent.
    """

    def __init__(self, call: Callable[[], APIFuture[ForwardBackwardOutput]], *step: Any) -> None:
        super().__init__(*step)
        self._call = call

    def _submit(self) -> APIFuture[StepOutput]:
        self._failures.refuse(self._era)
        started = time.perf_counter()
        try:
            output = self._call().result()
        except BaseException as error:
            # Nothing is said of the loss: of a call in several chunks, some may be accumulated.
            self._report(
                f"the regularization of step {self._step}, whose own loss the server refused,",
                error,
            )
            raise
        seconds = time.perf_counter() - started
        try:
            linear, composition = self._linearized(output)
            backward = None
            if composition.gradient.flat.numpy().any():  # a seventh of what torch takes
                backward = concurrent_future(self._client.forward_backward(linear, sdk.LOSS))
        except BaseException as error:
            raise self._without_regularizers(error) from error.__cause__
        record = _with_base(composition.record, output.metrics.get("loss:sum"), seconds)
        outer: concurrent.futures.Future[StepOutput] = concurrent.futures.Future()
        if backward is None:
            outer.set_result(self._output(output, record, 0.0))
            return StepFuture(outer)

        def outcome() -> StepOutput:
            try:
                surrogate = backward.result().metrics.get("loss:sum")
            except BaseException as error:
                raise self._without_regularizers(error, " wholly") from error.__cause__
            return self._output(output, record, surrogate)

        backward.add_done_callback(lambda _: settle(outer, outcome))
        return StepFuture(outer)

    def _output(
        self, output: ForwardBackwardOutput, record: StepRecord, surrogate: float | None
    ) -> StepOutput:
        """The server's output, its metrics where they were, and the record beside them."""
        metrics = {**metrics_of(record, flat=self._flat), **output.metrics}
        if surrogate is not None:  # not every server tells
            metrics["surrogate_loss:sum"] = surrogate
        kind, outputs = output.loss_fn_output_type, output.loss_fn_outputs
        return StepOutput(kind, outputs, metrics, record=record)

    def _without_regularizers(self, error: BaseException, how: str = "") -> BaseException:
        error.add_note(
            f"The server's own loss of step {self._step} was computed, and its gradient is "
            f"accumulated; the regularizers' is not{how}."
        )
        self._report(
            f"the regularization of step {self._step}, whose own loss is accumulated,", error
        )
        return error


def _with_base(record: StepRecord, loss: float | None, seconds: float) -> StepRecord:
    """The record of the regularizers, with the server's loss as the base loss.

    Its gradient with respect to the logprobs is not known here, nor therefore the total one, nor
    what depends on it. A server that tells no loss leaves nan.
    """
    value = math.nan if loss is None else loss
    regularizers: dict[str, RegularizerRecord] = {
        name: {**each, "cosine_to_total": None} for name, each in record["regularizers"].items()
    }
    return {
        **record,
        "loss_total": value + record["regularizer_total"],
        "base_loss": {
            "value": value,
            "grad_norm": None,
            "grad_rms": None,
            "cosine_to_total": None,
            "differentiable": True,
            "zero_gradient": None,
            "seconds": seconds,
            "non_finite_zeroed": 0,
            "custom": {},
        },
        "regularizers": regularizers,
        "total_grad_norm": None,
        "total_grad_rms": None,
    }
