"""Async terms: modes and context of their own, on one loop that is kept, or on the caller's."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import signal
import sys
import threading
import time
import traceback

import pytest
import torch

import term_library as library
from tinker_custom_loss import Composer, Regularizer, TermError, TermTimeoutError

DATA = [None, None]
trace_id: contextvars.ContextVar[str] = contextvars.ContextVar("trace_id")


@pytest.fixture
def logprobs():
    return [torch.linspace(-3, -1, 5), torch.linspace(-2, -0.5, 6).reshape(2, 3)]


def compute(fn, logprobs, **options):
    return Composer(None, [Regularizer(fn, 1.0, "term", **options)]).compute(DATA, logprobs)


@pytest.fixture(params=["own", "callers"])
def computed(request):
    """Compute a composition on either loop."""
    if request.param == "own":
        return lambda composer, logprobs: composer.compute(DATA, logprobs)
    return lambda composer, logprobs: asyncio.run(composer.compute_async(DATA, logprobs))


async def judge(x):
    """A weight that is no function of the logprobs as far as gradients go."""
    await asyncio.sleep(0)
    return x.exp()


async def holds_no_grad_in_a_child(data, logprobs):
    """``Σ stopped(exp(x))·x``, gradient ``exp(x)``."""
    x = logprobs[0]
    with torch.no_grad():
        (w,) = await asyncio.gather(judge(x))
    return (w * x).sum(), {}


class TestModes:
    def test_a_child_task_has_the_modes_it_was_started_in(self, logprobs, computed):
        term = Regularizer(holds_no_grad_in_a_child, 1.0, "judged", timeout=60)
        composition = computed(Composer(None, [term]), logprobs)
        torch.testing.assert_close(composition.gradients[0], logprobs[0].exp())

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_child_tasks_that_overlap_leave_nothing_behind(self, logprobs, computed, mode):
        """They leave their modes in the order in which they entered: the worst for a stack."""

        async def helper(entered, leave):
            with mode():
                entered.set()
                await leave.wait()

        async def gathers(data, logprobs):
            entered = [asyncio.Event(), asyncio.Event()]
            leave = [asyncio.Event(), asyncio.Event()]
            helpers = [
                asyncio.create_task(helper(*events)) for events in zip(entered, leave, strict=True)
            ]
            for event in entered:
                await event.wait()
            for leaving, task in zip(leave, helpers, strict=True):
                leaving.set()
                await task
            (result,) = await asyncio.gather(library.square_async(data, logprobs))
            return result

        composer = Composer(None, [Regularizer(gathers, 1.0, "gathers", timeout=60)])
        for _ in range(2):
            composition = computed(composer, logprobs)
            torch.testing.assert_close(composition.gradients[1], 2 * logprobs[1])

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_one_held_while_waiting_is_its_own(self, logprobs, computed, mode):
        """Torch keeps these modes by thread, and all async terms share one."""
        inside, done = threading.Event(), threading.Event()

        async def awaits_without_grad(data, logprobs):
            with mode():
                inside.set()
                await until(done)
                assert not (logprobs[0] * 1).requires_grad
            return logprobs[0].sum(), {}

        async def computes_meanwhile(data, logprobs):
            await until(inside)
            loss = logprobs[1].square().sum()
            done.set()
            return loss, {}

        terms = [
            Regularizer(awaits_without_grad, 1.0, "awaits", timeout=60),
            Regularizer(computes_meanwhile, 1.0, "computes", timeout=60),
        ]
        composition = computed(Composer(None, terms), logprobs)
        torch.testing.assert_close(composition.gradients[0], torch.ones(5))
        torch.testing.assert_close(composition.gradients[1], 2 * logprobs[1])

    def test_of_the_callers_loop_stay_as_they_are(self, logprobs):
        """A child of a term that waits without gradients takes none from the caller's tasks."""

        async def main():
            inside, done = asyncio.Event(), asyncio.Event()

            async def child():
                with torch.no_grad():
                    inside.set()
                    await done.wait()

            async def term(data, logprobs):
                await asyncio.gather(child())
                return library.square(data, logprobs)

            computing = asyncio.create_task(
                Composer(None, [Regularizer(term, 1.0, "term")]).compute_async(DATA, logprobs)
            )
            await inside.wait()
            meanwhile = torch.is_grad_enabled()
            done.set()
            await computing
            return meanwhile, asyncio.get_running_loop().get_task_factory()

        assert asyncio.run(main()) == (True, None)

    def test_the_callers_own_task_factory_goes_on_being_used(self, logprobs):
        made = []

        def factory(loop, coroutine, **options):
            made.append(coroutine.__qualname__)
            return asyncio.Task(coroutine, loop=loop, **options)

        async def main():
            loop = asyncio.get_running_loop()
            loop.set_task_factory(factory)
            term = Regularizer(holds_no_grad_in_a_child, 1.0, "judged")
            composition = await Composer(None, [term]).compute_async(DATA, logprobs)
            assert loop.get_task_factory() is factory
            return composition

        composition = asyncio.run(main())
        assert "judge" in made
        torch.testing.assert_close(composition.gradients[0], logprobs[0].exp())

    @pytest.mark.parametrize("place", ["inline", "async", "thread", "process"])
    def test_autocast_is_the_callers_wherever_a_term_runs(self, logprobs, place):
        fn = autocast_is_on_async if place == "async" else autocast_is_on
        term = Regularizer(
            fn, 1.0, "t", run_in_executor={"thread": True, "process": "process"}.get(place, False)
        )
        composer = Composer(None, [term])
        for expected in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=expected):
                record = composer.compute(DATA, logprobs).record
            assert record["regularizers"]["t"]["custom"]["autocast"] == expected

    def test_autocast_held_while_waiting_is_its_own(self, logprobs):
        inside, computed = threading.Event(), threading.Event()

        async def awaits_under_autocast(data, logprobs):
            with torch.autocast("cpu", torch.bfloat16):
                inside.set()
                await until(computed)
            return library.square(data, logprobs)

        async def computes_meanwhile(data, logprobs):
            await until(inside)
            product = logprobs[1] @ torch.ones(3)
            computed.set()
            return product.sum(), {"half": product.dtype == torch.bfloat16}

        terms = [
            Regularizer(awaits_under_autocast, 1.0, "awaits", timeout=60),
            Regularizer(computes_meanwhile, 1.0, "computes", timeout=60),
        ]
        record = Composer(None, terms).compute(DATA, logprobs).record
        assert record["regularizers"]["computes"]["custom"]["half"] == 0

    @pytest.mark.parametrize("place", [False, True])
    def test_a_term_that_leaves_gradients_off_does_it_to_itself(self, logprobs, place):
        def forgets(data, logprobs):
            result = library.square(data, logprobs)
            torch.set_grad_enabled(False)
            return result

        compute(forgets, logprobs, run_in_executor=place)
        assert torch.is_grad_enabled()
        after = compute(library.square, logprobs, run_in_executor=place)
        torch.testing.assert_close(after.gradients[0], 2 * logprobs[0])


def autocast_is_on(data, logprobs):
    on = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    return logprobs[0].sum(), {"autocast": on}


async def autocast_is_on_async(data, logprobs):
    await asyncio.sleep(0)
    return autocast_is_on(data, logprobs)


async def until(event):
    while not event.is_set():
        await asyncio.sleep(0.001)


class TestContext:
    @pytest.mark.parametrize("place", ["inline", "async", "thread", "pool", "lambda"])
    def test_a_term_runs_in_the_context_of_its_computation(self, logprobs, place):
        def sync(data, logprobs):
            return logprobs[0].sum(), {"id": int(trace_id.get())}

        async def asynchronous(data, logprobs):
            await asyncio.sleep(0)
            return sync(data, logprobs)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            options = {"run_in_executor": {"thread": True, "pool": pool}.get(place, False)}
            fn = {"async": asynchronous, "lambda": lambda *args: asynchronous(*args)}.get(
                place, sync
            )
            composer = Composer(None, [Regularizer(fn, 1.0, "t", **options)])
            for number in ("1", "2"):
                trace_id.set(number)
                record = composer.compute(DATA, logprobs).record
                assert record["regularizers"]["t"]["custom"]["id"] == int(number)
                record = asyncio.run(composer.compute_async(DATA, logprobs)).record
                assert record["regularizers"]["t"]["custom"]["id"] == int(number)


class TestTheKeptLoop:
    @pytest.mark.parametrize("place", [False, True])
    @pytest.mark.parametrize("form", ["async", "lambda", "decorated"])
    def test_it_is_the_same_one_at_every_step(self, logprobs, form, place):
        """What belongs to a loop, such as a connection that is kept, can be used again."""
        loops = set()

        async def term(data, logprobs):
            loops.add(asyncio.get_running_loop())
            await asyncio.sleep(0)
            return library.square(data, logprobs)

        @functools.wraps(term)
        def decorated(*args):
            return term(*args)

        fn = {"async": term, "lambda": lambda *args: term(*args), "decorated": decorated}[form]
        for _ in range(2):
            compute(fn, logprobs, run_in_executor=place)
        (loop,) = loops
        assert loop.is_running()

    def test_a_late_thread_that_awaits_ends_what_it_awaits(self, logprobs):
        ended = threading.Event()

        async def waits(data, logprobs):
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        with pytest.raises(TermTimeoutError):
            compute(lambda *args: waits(*args), logprobs, run_in_executor=True, timeout=0.05)
        assert ended.wait(60)

    def test_a_task_that_exits_ends_its_term_alone(self, logprobs):
        async def exits():
            sys.exit(3)

        async def gathers(data, logprobs):
            await asyncio.gather(exits())

        with pytest.raises(TermError, match='"term" raised SystemExit: 3'):
            compute(gathers, logprobs, timeout=30)
        assert compute(library.square_async, logprobs, timeout=30).loss_total > 0


class TestCtrlC:
    @pytest.mark.parametrize("is_async", [True, False])
    def test_ends_what_is_awaited_whichever_thread_hears_of_it(self, logprobs, is_async):
        """One that waits for a lock is not woken by a signal that another thread is given, and
        may be about to wait when it is given one itself."""
        started, ended = threading.Event(), threading.Event()

        async def waits_for_ever(data, logprobs):
            started.set()
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()

        def waits():
            frame = sys._current_frames()[threading.main_thread().ident]
            names = [frame.f_code.co_name for frame, _ in traceback.walk_stack(frame)]
            return {"wait", "compute"} <= {*names}

        def presses_ctrl_c():
            if started.wait(60):
                while not waits():
                    time.sleep(0.001)
                signal.pthread_kill(threading.get_ident(), signal.SIGINT)

        threading.Thread(target=presses_ctrl_c).start()
        with pytest.raises(KeyboardInterrupt):
            compute(waits_for_ever if is_async else lambda *args: waits_for_ever(*args), logprobs)
        assert ended.wait(60)


class TestInsideAnother:
    def test_a_composition_inside_an_async_term_says_so(self, logprobs):
        inner = Composer(None, [Regularizer(library.square_async, 1.0, "inner")])

        async def outer(data, logprobs):
            return logprobs[0].sum(), {"inner": inner.compute(data, logprobs).loss_total}

        with pytest.raises(TermError, match=r'async term "term" computes .* await compute_async'):
            compute(outer, logprobs, timeout=60)

    def test_also_where_the_inner_term_only_turns_out_to_be_async(self, logprobs):
        inner = Composer(
            None, [Regularizer(lambda *args: library.square_async(*args), 1.0, "inner")]
        )

        async def outer(data, logprobs):
            return logprobs[0].sum(), {"inner": inner.compute(data, logprobs).loss_total}

        with pytest.raises(TermError, match="await compute_async"):
            compute(outer, logprobs, timeout=60)

    @pytest.mark.parametrize("fn", [library.square, library.square_async])
    def test_awaited_there_it_works(self, logprobs, fn):
        inner = Composer(None, [Regularizer(fn, 1.0, "inner")])

        async def outer(data, logprobs):
            return logprobs[0].sum(), {
                "inner": (await inner.compute_async(data, logprobs)).loss_total
            }

        record = compute(outer, logprobs, timeout=60).record
        expected = inner.compute(DATA, logprobs).loss_total
        assert record["regularizers"]["term"]["custom"]["inner"] == expected

    def test_inside_a_sync_term_it_works(self, logprobs):
        inner = Composer(None, [Regularizer(library.square_async, 1.0, "inner")])

        def outer(data, logprobs):
            return logprobs[0].sum(), {"inner": inner.compute(data, logprobs).loss_total}

        for place in (False, True):
            assert compute(outer, logprobs, run_in_executor=place).loss_total


class TestOnTheCallersLoop:
    @pytest.mark.parametrize("form", ["async", "lambda"])
    def test_an_async_term_shares_the_callers_semaphore(self, logprobs, form):
        async def main():
            semaphore = asyncio.Semaphore(1)
            inside = asyncio.Event()

            async def limited(data, logprobs):
                inside.set()
                async with semaphore:  # belongs to the loop that waits for it first
                    return library.square(data, logprobs)

            fn = limited if form == "async" else lambda *args: limited(*args)
            composer = Composer(None, [Regularizer(fn, 1.0, "limited")])
            async with semaphore:
                computing = asyncio.create_task(composer.compute_async(DATA, logprobs))
                await inside.wait()
                waits_too = asyncio.create_task(semaphore.acquire())
                await asyncio.sleep(0)
            composition = await computing
            await waits_too
            return composition

        composition = asyncio.run(asyncio.wait_for(main(), 60))
        torch.testing.assert_close(composition.gradients[0], 2 * logprobs[0])

    def test_a_sync_term_leaves_the_loop_free(self, logprobs):
        async def main():
            running = threading.Event()
            go_on = threading.Event()

            def waits(data, logprobs):
                running.set()
                assert go_on.wait(60)
                return library.square(data, logprobs)

            composer = Composer(None, [Regularizer(waits, 1.0, "waits")])
            computing = asyncio.create_task(composer.compute_async(DATA, logprobs))
            await until(running)
            go_on.set()
            return await computing

        assert asyncio.run(main()).loss_total > 0

    def test_cancelled_it_ends_its_terms_first(self, logprobs):
        async def main():
            running = asyncio.Event()
            ended = []

            async def waits(data, logprobs):
                try:
                    running.set()
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(0)
                    ended.append(asyncio.current_task())

            composer = Composer(None, [Regularizer(waits, 1.0, "waits")])
            computing = asyncio.create_task(composer.compute_async(DATA, logprobs))
            await running.wait()
            computing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await computing
            (task,) = ended
            assert task.done()

        asyncio.run(asyncio.wait_for(main(), 60))

    def test_cancelled_it_runs_no_further_inline_term(self, logprobs):
        after, left = threading.Event(), threading.Event()

        class Turn(contextlib.AbstractContextManager):
            """What inline terms hold: left when the last one that runs has ended."""

            def __exit__(self, *_):
                left.set()

        async def main():
            running = threading.Event()
            go_on = threading.Event()

            def first(data, logprobs):
                running.set()
                assert go_on.wait(60)
                return library.square(data, logprobs)

            def second(data, logprobs):
                after.set()
                return library.square(data, logprobs)

            terms = [Regularizer(first, 1.0, "first"), Regularizer(second, 1.0, "second")]
            composer = Composer(None, terms, inline_lock=Turn())
            future = asyncio.create_task(composer.compute_async(DATA, logprobs))
            await until(running)
            future.cancel()
            with pytest.raises(asyncio.CancelledError):
                await future
            go_on.set()

        asyncio.run(main())
        assert left.wait(60)
        assert not after.is_set()
