"""Where terms run: at the same time in every mode, in any executor, and what their ends do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import term_library as library
import tinker_custom_loss
from tinker_custom_loss import (
    ChangedLogprobsError,
    Composer,
    Regularizer,
    RequestError,
    TermError,
    TermTimeoutError,
)
from tinker_custom_loss.running import processes as term_processes
from tinker_custom_loss.running import threads as term_threads
from tinker_custom_loss.running.modes import Modes

K = 2
DATA = [None, None]


def closes_over(lock):
    return lambda data, logprobs: (logprobs[0].sum() * lock.locked(), {})


@pytest.fixture
def logprobs():
    return [torch.linspace(-3, -1, 5), torch.linspace(-2, -0.5, 6).reshape(2, 3)]


def meets_in_files(data, logprobs, *, folder, index, count):
    """Ends once ``count`` terms have begun: run one after another, they would wait for ever."""
    Path(folder, str(index)).touch()
    deadline = time.monotonic() + 60
    while len(os.listdir(folder)) < count:
        assert time.monotonic() < deadline, "the other terms never began"
        time.sleep(0.001)
    return library.square(data, logprobs)


async def meets_async(data, logprobs, *, folder, index, count):
    Path(folder, str(index)).touch()
    async with asyncio.timeout(60):
        while len(os.listdir(folder)) < count:
            await asyncio.sleep(0.001)
    return library.square(data, logprobs)


def process_id(data, logprobs):
    return logprobs[0].sum(), {"pid": os.getpid()}


def thread_id(data, logprobs):
    return logprobs[0].sum(), {"thread": threading.get_ident()}


def notes_pid_and_hangs(data, logprobs, *, path):
    Path(path).write_text(str(os.getpid()))
    library.sleeps_for_ever(data, logprobs)


def notes_pid_and_waits(data, logprobs, *, path, go_on):
    Path(path).write_text(str(os.getpid()))
    while not Path(go_on).exists():
        time.sleep(0.001)
    return logprobs[0].sum(), {}


def with_a_lock(data, logprobs, *, lock):
    return logprobs[0].sum(), {}


@pytest.fixture(params=["async", "thread", "process", "thread pool", "process pool"])
def mode(request):
    """``(fn, run_in_executor)``: a term that meets the others, and one of the places."""
    if request.param == "async":
        yield meets_async, False
    elif request.param == "thread pool":
        with concurrent.futures.ThreadPoolExecutor(K) as pool:
            yield meets_in_files, pool
    elif request.param == "process pool":
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(K, mp_context=context) as pool:
            yield meets_in_files, pool
    else:
        yield meets_in_files, {"thread": True, "process": "process"}[request.param]


def test_all_terms_of_a_step_run_at_the_same_time(mode, logprobs, tmp_path):
    fn, place = mode
    terms = [
        Regularizer(
            fn,
            0.5,
            f"term-{index}",
            params={"folder": str(tmp_path), "index": index, "count": K},
            run_in_executor=place,
            timeout=120,
        )
        for index in range(K)
    ]
    composition = Composer(None, terms).compute([None, None], logprobs)
    for gradient, x in zip(composition.gradients, logprobs, strict=True):
        torch.testing.assert_close(gradient, K * 0.5 * 2 * x)


def test_terms_of_different_places_meet_too(logprobs, tmp_path):
    places = {"async": False, "thread": True, "process": "process"}
    terms = [
        Regularizer(
            meets_async if name == "async" else meets_in_files,
            1.0,
            name,
            params={"folder": str(tmp_path), "index": index, "count": 3},
            run_in_executor=place,
        )
        for index, (name, place) in enumerate(places.items())
    ]
    assert Composer(None, terms).compute([None, None], logprobs).loss_total > 0


class TestProcesses:
    def one(self, fn, **options):
        return Composer(None, [Regularizer(fn, 1.0, "far", run_in_executor="process", **options)])

    def pid(self, composer, logprobs):
        record = composer.compute([None, None], logprobs).record
        return int(record["regularizers"]["far"]["custom"]["pid"])

    def test_it_is_another_process_and_the_same_one_again(self, logprobs):
        composer = self.one(process_id)
        first, second = (self.pid(composer, logprobs) for _ in range(2))
        assert first == second != os.getpid()

    def test_one_that_dies_in_mid_term_is_named_and_replaced(self, logprobs):
        with pytest.raises(TermError, match='"far" ended with signal SIGKILL in mid-term') as info:
            self.one(library.kills_its_process).compute([None, None], logprobs)
        assert info.value.term == "far"
        assert self.pid(self.one(process_id), logprobs)

    def test_one_that_dies_and_leaves_a_child_is_still_seen_to_die(self, logprobs):
        """The child holds the pipe open, so that there is no end of file."""
        with pytest.raises(TermError, match='"far" ended with signal SIGKILL in mid-term'):
            self.one(library.forks_and_dies).compute([None, None], logprobs)

    def test_one_that_is_killed_from_outside(self, logprobs, tmp_path):
        path = tmp_path / "pid"
        composer = self.one(notes_pid_and_hangs, params={"path": str(path)})
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            computing = beside.submit(composer.compute, [None, None], logprobs)
            while not (path.exists() and path.read_text()):
                time.sleep(0.01)
            os.kill(int(path.read_text()), signal.SIGKILL)
            with pytest.raises(TermError, match="SIGKILL"):
                computing.result(60)
        assert self.pid(self.one(process_id), logprobs)

    def test_one_that_outlives_its_timeout_is_ended(self, logprobs, tmp_path):
        path = tmp_path / "pid"
        composer = self.one(notes_pid_and_hangs, params={"path": str(path)}, timeout=1.0)
        with pytest.raises(TermTimeoutError, match=r'"far" .* 1 s') as info:
            composer.compute([None, None], logprobs)
        assert info.value.term == "far"
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
        assert self.pid(self.one(process_id), logprobs)

    def test_skipped_it_leaves_the_step_to_the_others(self, logprobs):
        terms = [
            Regularizer(library.square, 1.0, "near"),
            Regularizer(
                library.kills_its_process, 1.0, "far", run_in_executor="process", on_error="skip"
            ),
        ]
        composition = Composer(None, terms).compute([None, None], logprobs)
        record = composition.record["regularizers"]["far"]
        assert record["skipped"]
        assert "SIGKILL" in record["error"]
        torch.testing.assert_close(composition.gradients[0], 2 * logprobs[0])

    def test_a_thread_that_ends_does_not_take_processes_with_it(self, logprobs):
        """On Linux, to die with one's parent is to die with the thread that started one."""
        composer = self.one(process_id)

        def in_a_new_process():
            term_processes.warm(len(term_processes._alive) + 1)
            return self.pid(composer, logprobs), threading.get_native_id()

        with concurrent.futures.ThreadPoolExecutor(1) as short:
            pid, thread = short.submit(in_a_new_process).result(60)
        while Path(f"/proc/self/task/{thread}").exists():  # a little longer than Python's thread
            time.sleep(0.01)
        assert self.pid(composer, logprobs) == pid

    def test_giving_up_on_a_step_spares_a_process_that_has_moved_on(self, logprobs):
        remote_call = term_processes.RemoteCall(
            tinker_custom_loss.running.evaluation.Call("far", process_id, {}),
            [None, None],
            torch.cat([x.flatten() for x in logprobs]).numpy(),
            tuple(tuple(x.shape) for x in logprobs),
            True,
            Modes.here(),
        )
        run = term_processes.ProcessRun(remote_call, None)
        pid = int(run.run().evaluation[1]["pid"])
        run.kill()  # too late: the process may be running another step's term by now
        assert self.pid(self.one(process_id), logprobs) == pid

    def test_no_timeout_is_too_long(self, logprobs):
        composer = self.one(library.square, timeout=1e9)
        assert composer.compute([None, None], logprobs).loss_total > 0

    def test_what_a_prompt_or_a_notebook_defines_travels_by_value(self):
        program = (
            "import torch\n"
            "from tinker_custom_loss import Composer\n"
            "scale = 3.0\n"
            "def term(data, logprobs): return scale * logprobs[0].sum(), {}\n"
            "far = {'fn': term, 'weight': 1.0, 'name': 'far', 'run_in_executor': 'process'}\n"
            "print(Composer(None, [far]).compute([0], [torch.ones(2)]).gradients[0].tolist())\n"
        )
        package = Path(tinker_custom_loss.__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=package,
            timeout=120,
        )
        assert done.stdout == "[3.0, 3.0]\n", done.stderr

    def test_a_closure_travels_and_is_pickled_once(self, logprobs):
        pickled = []

        class Params(dict):
            def __reduce__(self):
                pickled.append(1)
                return dict, (dict(self),)

        factor = 3.0

        def closure(data, logprobs, *, options):
            options["calls"] = options.get("calls", 0) + 1
            return factor * logprobs[0].sum(), {"calls": options["calls"], "pid": os.getpid()}

        composer = self.one(closure, params={"options": Params()})
        seen = {}
        for _ in range(6):
            composition = composer.compute(DATA, logprobs)
            custom = composition.record["regularizers"]["far"]["custom"]
            assert custom["calls"] == seen.get(custom["pid"], 0) + 1  # it keeps what it was sent
            seen[custom["pid"]] = custom["calls"]
        torch.testing.assert_close(composition.gradients[0], torch.full((5,), 3.0))
        assert len(pickled) == 1

    def test_ctrl_c_is_not_for_one(self, logprobs, tmp_path):
        """The terminal sends it to every process."""
        path = tmp_path / "pid"
        go_on = tmp_path / "go on"
        composer = self.one(notes_pid_and_waits, params={"path": str(path), "go_on": str(go_on)})
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            computing = beside.submit(composer.compute, DATA, logprobs)
            while not (path.exists() and path.read_text()):
                time.sleep(0.01)
            os.kill(int(path.read_text()), signal.SIGINT)
            go_on.touch()
            assert computing.result(60).loss_total

    def test_a_forked_child_that_exits_spares_a_term_of_its_parent(self, logprobs, tmp_path):
        """multiprocessing terminates its daemons when a process ends that believes them its own."""
        path, go_on = tmp_path / "pid", tmp_path / "go on"
        program = (
            "import concurrent.futures, os, sys, time, torch, pathlib, test_execution\n"
            "from tinker_custom_loss import Composer\n"
            "if __name__ == '__main__':\n"
            "    path, go_on = map(pathlib.Path, sys.argv[1:])\n"
            "    params = {'path': str(path), 'go_on': str(go_on)}\n"
            "    far = {'fn': test_execution.notes_pid_and_waits, 'weight': 1.0, 'name': 'far',\n"
            "           'params': params, 'run_in_executor': 'process'}\n"
            "    composer = Composer(None, [far])\n"
            "    pool = concurrent.futures.ThreadPoolExecutor(1)\n"
            "    computing = pool.submit(composer.compute, [0], [torch.ones(2)])\n"
            "    while not (path.exists() and path.read_text()): time.sleep(0.01)\n"
            "    child = os.fork()\n"
            "    if child == 0: sys.exit(0)\n"
            "    os.waitpid(child, 0)\n"
            "    go_on.touch()\n"
            "    print(computing.result(60).loss_total)\n"
        )
        script = tmp_path / "forks.py"
        script.write_text(program)
        roots = [Path(tinker_custom_loss.__file__).parents[1], Path(__file__).parent]
        done = subprocess.run(
            [sys.executable, script, path, go_on],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout == "2.0\n", done.stderr

    def test_what_only_this_process_can_import_is_named(self, logprobs, tmp_path, monkeypatch):
        module = tmp_path / "vanishing.py"
        module.write_text("def term(data, logprobs):\n    return logprobs[0].sum(), {}\n")
        monkeypatch.syspath_prepend(tmp_path)
        import vanishing

        self.pid(self.one(process_id), logprobs)  # a process that is already there
        composer = self.one(vanishing.term)
        module.unlink()
        with pytest.raises(TermError, match='the process of the term "far" cannot load it') as info:
            composer.compute([None, None], logprobs)
        assert info.value.error_type == "ModuleNotFoundError"


class TestRefusedWhenGiven:
    @pytest.mark.parametrize(
        ("fn", "params"),
        [
            (closes_over(threading.Lock()), {}),
            (with_a_lock, {"lock": threading.Lock()}),
        ],
    )
    @pytest.mark.parametrize("pool", [False, True])
    def test_what_cannot_be_pickled(self, fn, params, pool):
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
            place = executor if pool else "process"
            term = Regularizer(fn, 1.0, "far", params=params, run_in_executor=place)
            with pytest.raises(
                RequestError, match=r"cannot be pickled: .*; create there what cannot"
            ):
                Composer(None, [term])

    def test_a_pool_that_forks(self):
        """Torch hangs in its processes at the first parallel operation."""
        fork = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=fork) as pool:
            term = Regularizer(library.square, 1.0, "far", run_in_executor=pool)
            with pytest.raises(RequestError, match=r'mp_context=.*get_context\("spawn"\)'):
                Composer(None, [term])

    @pytest.mark.parametrize("place", ["processes", "thread", 1, None, dict])
    def test_no_place_at_all(self, place):
        with pytest.raises(
            RequestError, match=r'False, True, "process" or a concurrent\.futures\.Ex'
        ):
            Regularizer(library.square, 1.0, "lost", run_in_executor=place)


class TestTimeouts:
    @pytest.mark.parametrize("place", [True, "pool"])
    def test_of_a_thread(self, logprobs, place):
        pool = concurrent.futures.ThreadPoolExecutor(1)
        go_on = threading.Event()

        def waits(data, logprobs):
            go_on.wait(60)
            return logprobs[0].sum(), {}

        term = Regularizer(
            waits, 1.0, "slow", run_in_executor=pool if place == "pool" else True, timeout=0.05
        )
        with pytest.raises(TermTimeoutError, match=r'"slow" outlived its timeout of 0\.05 s'):
            Composer(None, [term]).compute([None, None], logprobs)
        go_on.set()
        pool.shutdown()

    def test_late_threads_are_bounded_and_spoken_of(self, logprobs, monkeypatch, caplog):
        monkeypatch.setattr(term_threads, "MOST_LEFT_BEHIND", 3)
        go_on, ended = threading.Event(), threading.Semaphore(0)

        def waits(data, logprobs):
            go_on.wait(60)
            ended.release()
            return logprobs[0].sum(), {}

        term = Regularizer(waits, 1.0, "slow", run_in_executor=True, timeout=0.01, on_error="skip")
        composer = Composer(library.square, [term])
        errors = [
            composer.compute(DATA, logprobs).record["regularizers"]["slow"]["error"]
            for _ in range(5)
        ]
        go_on.set()
        assert ["outlived its timeout" in error for error in errors] == 3 * [True] + 2 * [False]
        assert 'set run_in_executor to "process"' in errors[3]
        assert len(caplog.records) >= 3
        assert "thread 3 of at most 3" in caplog.text
        for _ in range(3):
            assert ended.acquire(timeout=60)

    def test_of_an_async_term_ends_it(self, logprobs):
        ended = threading.Event()

        async def waits(data, logprobs):
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        term = Regularizer(waits, 1.0, "slow", timeout=0.05)
        with pytest.raises(TermTimeoutError, match="slow"):
            Composer(None, [term]).compute([None, None], logprobs)
        assert ended.wait(60)

    def test_holds_while_an_inline_term_keeps_the_step(self, logprobs):
        """The slow term has ended by the time that the inline one lets the step look."""
        ended = threading.Event()

        class Pool(concurrent.futures.ThreadPoolExecutor):
            def submit(self, fn, /, *args):
                future = super().submit(fn, *args)
                future.add_done_callback(lambda _: ended.set())
                return future

        def slow(data, logprobs):
            time.sleep(0.05)
            return logprobs[0].sum(), {}

        def inline(data, logprobs):
            assert ended.wait(60)
            return logprobs[0].sum(), {}

        terms = [
            Regularizer(inline, 1.0, "inline"),
            Regularizer(slow, 1.0, "slow", run_in_executor=Pool(1), timeout=0.01),
        ]
        with pytest.raises(TermTimeoutError, match="slow"):
            Composer(None, terms).compute([None, None], logprobs)


@pytest.fixture(scope="module")
def cluster():
    """A real one: a scheduler and two worker processes."""
    distributed = pytest.importorskip("distributed", reason="needs the extra dask")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed", "ignore::ResourceWarning")
class TestDask:
    def test_terms_run_in_its_workers_at_the_same_time(self, cluster, logprobs, tmp_path):
        executor = cluster.get_executor(pure=False)
        terms = [
            Regularizer(
                meets_in_files,
                1.0,
                f"term-{index}",
                params={"folder": str(tmp_path), "index": index, "count": 2},
                run_in_executor=executor,
            )
            for index in range(2)
        ]
        far = Regularizer(process_id, 1.0, "where", run_in_executor=executor)
        composition = Composer(None, terms).compute([None, None], logprobs)
        torch.testing.assert_close(composition.gradients[1], 4 * logprobs[1])
        record = Composer(None, [far]).compute([None, None], logprobs).record
        workers = cluster.run(os.getpid).values()
        assert record["regularizers"]["where"]["custom"]["pid"] in workers

    def test_a_failure_there_is_the_terms(self, cluster, logprobs):
        executor = cluster.get_executor(pure=False)
        term = Regularizer(library.raises, 1.0, "far", run_in_executor=executor)
        with pytest.raises(TermError, match='"far" raised KeyError') as info:
            Composer(None, [term]).compute([None, None], logprobs)
        assert info.value.error_type == "KeyError"
        assert "no such reward" in info.value.traceback


def test_an_executor_that_is_shut_down_is_an_error_of_the_term(logprobs):
    pool = concurrent.futures.ThreadPoolExecutor(1)
    pool.shutdown()
    term = Regularizer(library.square, 1.0, "late", run_in_executor=pool)
    with pytest.raises(TermError, match='"late" raised RuntimeError: cannot schedule'):
        Composer(None, [term]).compute([None, None], logprobs)


def test_a_term_in_a_thread_pool_has_memory_of_its_own(logprobs):
    """One that changes its logprobs is refused, and has not changed those of the others."""
    changed = threading.Event()
    seen = []

    def changes_in_place(data, logprobs):
        logprobs[0].detach().zero_()
        changed.set()
        return logprobs[0].sum(), {}

    def computes_after(data, logprobs):
        assert changed.wait(60)
        seen.append(logprobs[0].detach().clone())
        return logprobs[0].square().sum(), {}

    given = logprobs[0].detach().clone()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        terms = [
            Regularizer(changes_in_place, 1.0, "bad", run_in_executor=pool, on_error="skip"),
            Regularizer(computes_after, 1.0, "good"),
        ]
        with pytest.raises(ChangedLogprobsError, match='"bad" changed the logprobs in place'):
            Composer(None, terms).compute([None, None], logprobs)
    torch.testing.assert_close(seen, [given])
    torch.testing.assert_close(logprobs[0].detach(), given)


def test_what_travels_is_small_and_plain():
    """No tensor: torch would send a file descriptor, and a machine elsewhere could not open it."""
    call = tinker_custom_loss.running.evaluation.Call("far", library.square, {})
    values = torch.zeros(1000).numpy()
    remote_call = term_processes.RemoteCall(call, [None], values, ((1000,),), True, Modes.here())
    text = pickle.dumps(remote_call)
    assert b"rebuild" not in text
    assert len(text) < values.nbytes + 1000
