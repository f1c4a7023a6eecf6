"""From a request to its reply, with no thread, descriptor or process in sight."""

from __future__ import annotations

import contextlib
import functools
import logging
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from ..composer import Composer
from ..composition import ComposedLoss, Composition
from ..errors import (
    CustomLossError,
    RequestError,
    said,
)
from ..record import flatten
from ..regularizer import BASE_LOSS, LossFn, is_coroutine_function
from ..regularizer import Regularizer as RegularizerOptions
from ..running.evaluation import is_of_catalogue
from ..terms import Term
from ..terms.registry import Registry
from .cancellation import Request, ending_if_forked, interruptible
from .logs import shorten
from .messagepack import Message
from .messages import Regularizer, Terms, decode_compute, decode_totals
from .messages import Term as TermSpec
from .typed import read

if TYPE_CHECKING:
    from ..insight import Recorder

__all__ = ["Service", "composer_arguments", "error_message", "id_of", "op_of"]

logger = logging.getLogger(__name__)

_MOST_COMPOSERS = 64
_CONSTANTS = {type(None), bool, int, float, str}


class _Request(msgspec.Struct):
    op: str


def op_of(message: Message) -> str:
    """What a message asks for.

    Raises:
        ProtocolError: it does not say.
    """
    return message.op if isinstance(message.op, str) else read(message.packed, _Request).op


def id_of(message: Message | None) -> int | None:
    """The id of a request; None if it has none, or one that is not valid."""
    request_id = None if message is None else message.id
    return request_id if type(request_id) is int and request_id >= 0 else None


class Service:
    """Answers requests that need no knowledge of other requests.

    Args:
        registry: what may be named.
        inline_lock: see :class:`~tinker_custom_loss.Composer`.
        recorder: what logs the record of every step, and keeps steps.
    """

    def __init__(
        self,
        registry: Registry,
        inline_lock: contextlib.AbstractContextManager[Any] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.registry = registry
        self._inline_lock = inline_lock
        self._recorder = recorder
        self._composers: dict[bytes, tuple[Composer, bool]] = {}

    def compute(
        self,
        message: Message,
        in_flight: Request | None = None,
        room: Callable[[int], memoryview | None] | None = None,
    ) -> dict[str, Any]:
        """The ``result`` of a ``compute`` message, without its id.

        ``room`` gives memory of so many bytes for the gradient, if it has some.

        Raises:
            CustomLossError: whatever is at fault, see :mod:`tinker_custom_loss.errors`.
        """
        request = decode_compute(message)
        composer, borrows = self._composer(request.terms, message)
        if message.place is not None and not borrows:
            request = decode_compute(message.with_own_payload())
        compute: Callable[..., ComposedLoss] = composer.compute_loss
        if request.gradients:
            memory = None
            if room is not None and self._recorder is None:  # which may keep the gradient
                memory = room(request.logprobs.flat.nbytes)
            dtype = request.logprobs.flat.dtype
            out = None if memory is None else torch.frombuffer(memory, dtype=dtype)
            compute = functools.partial(composer.compute, out=out)
        computed = compute(
            request.data,
            request.logprobs,
            step=request.step,
            totals=request.totals,
            cancelled=in_flight,
        )
        gradient = computed.gradient if isinstance(computed, Composition) else None
        if self._recorder is not None and gradient is not None and request.totals is None:
            self._record(self._recorder, computed, request.step)
        return {
            "op": "result",
            "loss_total": computed.loss_total,
            "gradients": gradient,
            "record": computed.record,
        }

    def totals(self, message: Message) -> dict[str, Any]:
        """The ``result`` of a ``totals`` message, without its id.

        Raises:
            CustomLossError: whatever is at fault; also where the datums cannot be a part of the
                step whose totals the message has.
        """
        request = decode_totals(message)
        composer, borrows = self._composer(request.terms, message)
        if message.place is not None and not borrows:
            request = decode_totals(message.with_own_payload())
        if request.totals is not None:
            composer.check_totals(request.totals, request.data)
        return {"op": "result", "totals": composer.totals(request.data)}

    def terms(self) -> dict[str, Any]:
        """The ``result`` of a ``terms`` message, without its id."""
        return {"op": "result", "terms": self.registry.describe()}

    def _record(self, recorder: Recorder, computed: ComposedLoss, step: int | None) -> None:
        """A disk that is full costs a line, never a step."""
        if step is None:
            logger.error("a step is not recorded: the call does not say which it is; give :step")
            return
        try:
            recorder.log(flatten(computed.record), step)
        except (OSError, RequestError) as error:
            logger.error("step %d cannot be recorded: %s", step, error)

    def _composer(self, key: bytes, message: Message) -> tuple[Composer, bool]:
        """A training loop asks for the same terms at every step: check them once.

        Also says whether they may borrow the payload of their request. The terms of the catalogue
        write nowhere, and are done with it when they return; a user's may keep what it is given,
        change it, or fork, and so may what runs elsewhere, or keeps steps.
        """
        known = self._composers.get(key)
        if known is None:
            terms = read(message.packed, Terms)
            composer = Composer(
                **composer_arguments(terms, self._fn),
                inline_lock=self._inline_lock,
                recorder=self._recorder,
            )
            given = [term for term in [terms.base_loss, *terms.regularizers] if term is not None]
            borrows = self._recorder is None and all(map(self._borrows, given))
            known = composer, borrows
            if not any(_could_change(term) for term in given):
                if len(self._composers) >= _MOST_COMPOSERS:
                    self._composers.clear()
                self._composers[key] = known
        return known

    def _borrows(self, spec: TermSpec) -> bool:
        elsewhere = isinstance(spec, Regularizer) and spec.run_in_executor
        return not elsewhere and is_of_catalogue(self.registry.resolve(spec.fn))

    def _fn(self, spec: TermSpec) -> LossFn:
        fn = self.registry.resolve(spec.fn)
        where = isinstance(spec, Regularizer) and spec.run_in_executor
        if where == "process" or is_of_catalogue(fn):
            return fn
        elsewhere = where or is_coroutine_function(fn)
        guarded = ending_if_forked if elsewhere else interruptible
        return fn.called_through(guarded) if isinstance(fn, Term) else guarded(fn)


def composer_arguments(terms: Terms, resolve: Callable[[TermSpec], LossFn]) -> dict[str, Any]:
    """The arguments of a :class:`~tinker_custom_loss.Composer`, with the functions for their names.

    Raises:
        RequestError: ``resolve`` knows no such function; with the path of the name.
    """

    def resolved(spec: TermSpec, path: str) -> LossFn:
        try:
            return resolve(spec)
        except RequestError as error:
            raise RequestError(f"{path}: {error}", path=f"{path}.fn") from None

    arguments: dict[str, Any] = {}
    if terms.base_loss is not None:
        spec = terms.base_loss
        fn = resolved(spec, BASE_LOSS)
        try:
            base = RegularizerOptions(
                fn, 1.0, BASE_LOSS, params=spec.params, reduction=spec.reduction
            )
        except RequestError as error:
            raise RequestError(str(error), path=f"{BASE_LOSS}.{error.path}") from error
        arguments = {"base_loss_fn": fn, "base_params": base.params}
    return {
        **arguments,
        "regularizers": [
            {**msgspec.structs.asdict(spec), "fn": resolved(spec, f"regularizers[{index}]")}
            for index, spec in enumerate(terms.regularizers)
        ],
    }


def _could_change(term: TermSpec) -> bool:
    """Whether a term could change its params, which no other request must see."""
    return not _CONSTANTS.issuperset(map(type, term.params.values()))


def error_message(error: BaseException, request_id: int | None = None) -> dict[str, Any]:
    """The ``error`` message that tells of an exception. What is not of this package is its bug."""
    kind, message = "internal", f"{type(error).__name__}: {said(error)}"
    error_type: str | None = type(error).__qualname__
    trace: str | None = "".join(traceback.format_exception(error))
    if isinstance(error, CustomLossError):
        kind, message = error.kind, str(error)
        error_type = getattr(error, "error_type", None)
        trace = getattr(error, "traceback", None)
    token = getattr(error, "token", None)
    return {
        "op": "error",
        "id": request_id,
        "error": {
            "kind": kind,
            "message": shorten(message),
            "type": error_type,
            "term": getattr(error, "term", None),
            "traceback": None if trace is None else shorten(trace),
            "path": getattr(error, "path", None),
            "datum": getattr(error, "datum", None),
            "token": None if token is None else list(token),
        },
    }
