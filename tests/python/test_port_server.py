"""The worker process, driven as a host drives it: over file descriptors 3 and 4."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from port_client import (
    PATHOLOGICAL,
    PortClient,
    batch,
    compute,
    gradients,
    group,
    group_is_empty,
    l2,
)
from tinker_custom_loss.fast_paths import fast
from tinker_custom_loss.port.messagepack import pack
from tinker_custom_loss.port.shapes import pack_shapes

HERE = Path(__file__).parent
ONE_OF_TWO = pack_shapes([(2,)])


@pytest.fixture(scope="module")
def shared():
    """One worker for everything that it must survive."""
    with PortClient(load=[PATHOLOGICAL]) as client:
        yield client


@pytest.fixture
def worker(shared):
    shared.logs.clear()
    yield shared
    shared.assert_serving()


@pytest.fixture
def own():
    """A worker that the test may end."""
    with PortClient(load=[PATHOLOGICAL]) as client:
        yield client


def started(client: PortClient, fn: str, message: str, **fields) -> int:
    """Send a request for a term, and wait until the term says in a log that it runs."""
    request_id = client.send("compute", **compute(f"pathological:{fn}", **fields))
    await_log(client, message)
    return request_id


def await_log(client: PortClient, message: str) -> None:
    while not any(log["message"] == message for log in client.logs):
        pong = client.ask("ping")
        assert pong["op"] == "result"
    client.logs.clear()


class TestReady:
    def test_it_speaks_first_and_says_what_it_is(self, shared):
        ready = shared.ready
        assert ready["op"] == "ready"
        assert ready["protocol"] == 3
        assert ready["torch"] == torch.__version__
        assert ready["pid"] == shared.process.pid
        assert ready["rss"] > 50_000_000
        assert (ready["max_frame"], ready["max_in_flight"]) == (1 << 30, 4)
        names = [term["name"] for term in ready["terms"]]
        assert {"nll", "l2", "entropy", "kl"} < {*names}
        assert "pathological:harmless" in names
        assert "pathological:_private" not in names

    def test_terms_says_the_same_again(self, worker):
        assert worker.ask("terms")["terms"] == worker.ready["terms"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--load", "no_such_module"], "ModuleNotFoundError"),
            (["--colour"], "--colour"),
        ],
    )
    def test_a_failed_start_is_the_first_frame_and_exit_status_1(self, options, message):
        with PortClient(*options, await_ready=False) as client:
            reply = client.receive()
            assert reply["op"] == "error"
            assert reply["id"] is None
            assert reply["error"]["kind"] == "startup"
            assert message in reply["error"]["message"]
            assert client.receive() is None
            assert client.process.wait(30) == 1

    def test_by_hand_it_says_what_it_is_for(self):
        done = subprocess.run(
            [sys.executable, "-m", "tinker_custom_loss.port"],
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "python")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "is started by Tinkex.CustomLoss" in done.stderr


class TestCompute:
    def test_a_gradient_comes_back_in_the_dtype_and_shapes_of_the_logprobs(self, worker):
        logprobs = [torch.full((2, 3), -1.0).bfloat16(), torch.tensor([-2.0]).bfloat16()]
        reply = worker.ask("compute", **l2(logprobs=batch(*logprobs)))
        first, second = gradients(reply)
        assert first.dtype == torch.bfloat16
        assert first.tolist() == [[-2.0] * 3] * 2
        assert second.tolist() == [-4.0]
        assert reply["loss_total"] == 10.0
        assert reply["record"]["regularizers"]["term"]["value"] == 10.0

    def test_without_gradients_there_are_none(self, worker):
        reply = worker.ask("compute", **l2(gradients=False))
        assert reply["gradients"] is None
        assert reply["loss_total"] == 5.0

    def test_garbage_is_collected_but_not_sought_among_what_was_imported(self, worker):
        reply = worker.ask("compute", **compute("pathological:counts_what_is_never_collected"))
        counted = reply["record"]["regularizers"]["term"]["custom"]
        assert counted["collects"] == 1.0
        assert counted["kept"] > 100_000

    def test_a_user_function_sees_real_datums(self, worker):
        weights = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
        data = {
            "count": 2,
            "tokens": batch(torch.tensor([7, 8]), torch.tensor([9])),
            "inputs": {"weights": batch(*weights)},
        }
        logprobs = batch(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0]))
        reply = worker.ask(
            "compute", **compute("pathological:looks_at_data", logprobs=logprobs, data=data)
        )
        assert reply["loss_total"] == -14.0
        assert reply["record"]["regularizers"]["term"]["custom"] == {"tokens": 3, "first": 7}
        for gradient, weight in zip(gradients(reply), weights, strict=True):
            assert torch.equal(gradient, weight)

    def test_a_built_in_term_reads_the_columns(self, worker):
        data = {"count": 1, "inputs": {"weights": batch(torch.tensor([0.5, 0.0]))}}
        request = {
            "logprobs": batch(torch.tensor([-1.0, -2.0])),
            "data": data,
            "base_loss": {"fn": "nll", "params": {"reduction": "token_sum"}},
            "regularizers": [],
        }
        reply = worker.ask("compute", **request)
        assert reply["loss_total"] == 0.5
        assert gradients(reply)[0].tolist() == [-0.5, 0.0]

    def test_a_large_gradient_comes_back_whole(self, worker):
        logprobs = torch.linspace(-3, -1, 1_000_003)
        reply = worker.ask("compute", **l2(logprobs=batch(logprobs)))
        assert torch.equal(gradients(reply)[0], 2 * logprobs)

    def test_several_requests_wait_side_by_side(self, worker):
        began = time.monotonic()
        slow = compute("pathological:waits", params={"seconds": 1.0})
        ids = {worker.send("compute", **slow) for _ in range(4)}
        assert {worker.receive()["id"] for _ in ids} == ids
        assert time.monotonic() - began < 3.0

    def test_inline_terms_of_several_requests_take_turns(self, worker):
        slow = compute("pathological:slow", params={"seconds": 0.2})
        began = time.monotonic()
        ids = {worker.send("compute", **slow) for _ in range(3)}
        assert {worker.receive()["id"] for _ in ids} == ids
        assert time.monotonic() - began >= 0.6

    def test_a_term_may_run_in_a_process(self, worker):
        spec = compute("pathological:harmless", run_in_executor="process", params={"scale": 2.0})
        reply = worker.ask("compute", **spec)
        assert gradients(reply)[0].tolist() == [2.0, 2.0]

    def test_params_that_a_term_changes_are_new_for_every_request(self, worker):
        spec = compute("pathological:remembers", params={"seen": []})
        for _ in range(2):
            reply = worker.ask("compute", **spec)
            assert reply["record"]["regularizers"]["term"]["custom"] == {"seen": 1}

    def test_params_that_are_equal_but_not_the_same_are_told_apart(self, worker):
        for scale in (2, 2.5, 1, 1.0, True):
            spec = compute("pathological:harmless", params={"scale": scale})
            assert worker.ask("compute", **spec)["loss_total"] == -3.0 * scale


BAD_REQUESTS = [
    # what is changed in a good request, the kind of error, its path, a part of its message
    ({"regularizers": [{"name": "a", "fn": "l3", "weight": 1}]}, "request", "regularizers[0].fn",
     'there is no term "l3"; of 68, the nearest are: kl, l1, l2'),
    ({"regularizers": [{"name": "a", "fn": "os:getpid", "weight": 1}]}, "request",
     "regularizers[0].fn", '"os" was not loaded'),
    ({"regularizers": [{"name": "a", "fn": "pathological:_private", "weight": 1}]}, "request",
     "regularizers[0].fn", "private"),
    ({"regularizers": [{"name": "a", "fn": "l2", "weight": 1}] * 2}, "request",
     "regularizers[1].name", '"a" is already taken'),
    ({"regularizers": [{"name": "", "fn": "l2", "weight": 1}]}, "request",
     "regularizers[0].name", "non-empty"),
    ({"regularizers": [{"name": "a", "fn": "l2", "weight": float("nan")}]}, "request",
     "regularizers[0].weight", "finite"),
    ({"regularizers": [{"name": "a", "fn": "l2", "weight": 1}, {"name": "b", "fn": "l2",
     "weight": "heavy"}]}, "protocol", "regularizers[1].weight",
     "expected a float at `regularizers[1].weight`, got a string"),
    ({"regularizers": [{"name": "a", "fn": 7, "weight": 1}]}, "protocol",
     "regularizers[0].fn", "expected a string"),
    ({"regularizers": [{"name": "a", "fn": "l2"}]}, "protocol", "regularizers[0].weight",
     'the required key "weight" is missing'),
    ({"regularizers": [{"name": "a", "fn": "l2", "weight": 1, "params": {"colour": 1}}]},
     "request", "regularizers[0].params", "colour"),
    ({"regularizers": [{"name": "a", "fn": "l2", "weight": 1, "timeout": 1.5}]}, "request",
     "regularizers[0].timeout", "inline"),
    ({"regularizers": [{"name": "a", "fn": "l2", "weight": 1, "on_error": "shrug"}]}, "request",
     "regularizers[0].on_error", "shrug"),
    ({"regularizers": []}, "request", "regularizers", "nothing to compute"),
    ({"regularizers": {}}, "protocol", "regularizers", "expected an array"),
    ({"regularizers": [7]}, "protocol", "regularizers[0]", "expected a map"),
    ({"base_loss": {"fn": "nl"}}, "request", "base_loss.fn", "the nearest are: nll"),
    ({"base_loss": "nll"}, "protocol", "base_loss", "expected a map"),
    ({"logprobs": None}, "protocol", "logprobs", "expected a map at `logprobs`, got nil"),
    ({"logprobs": {"dtype": "float32", "shapes": ONE_OF_TWO}}, "protocol",
     "logprobs.data", "missing"),
    ({"logprobs": {"dtype": "float8", "shapes": ONE_OF_TWO, "data": [0, 1]}}, "request",
     "logprobs.dtype", 'unknown dtype "float8"'),
    ({"logprobs": batch(torch.tensor([1]))}, "request", "logprobs.dtype", "float dtype"),
    ({"logprobs": {"dtype": "float32", "shapes": pack_shapes([(3,)]), "data": [0, 8]}}, "request",
     "logprobs.data", "hold 3 values of float32, which is 12 bytes, but `logprobs.data` has 8"),
    ({"logprobs": {"dtype": "float32", "shapes": pack_shapes([(3,)]), "data": [8, 12]}}, "protocol",
     "logprobs.data", "do not lie in the payload, which has 0"),
    ({"logprobs": {"dtype": "float32", "shapes": [[2]], "data": [0, 8]}}, "protocol",
     "logprobs.shapes", "expected a bin at"),
    ({"logprobs": {"dtype": "float32", "shapes": ONE_OF_TWO[:6], "data": [0, 8]}}, "protocol",
     "logprobs.shapes", "are 6 bytes; expected 4 a number"),
    ({"logprobs": {"dtype": "float32", "shapes": ONE_OF_TWO[:4], "data": [0, 8]}}, "protocol",
     "logprobs.shapes", "end within those of datum 0"),
    ({"logprobs": {"dtype": "float32", "shapes": pack_shapes([None]), "data": [0, 0]}}, "request",
     "logprobs.shapes[0]", "got nil"),
    ({"logprobs": batch(torch.zeros(1, 1, 2))}, "request", "logprobs.shapes[0]", "[T] or [T,K]"),
    ({"logprobs": {"dtype": "float32", "shapes": b"", "data": [0, 0]}}, "request", "data", "empty"),
    ({"data": {"count": 2}}, "request", "data.count", "there are logprobs of 1"),
    ({"data": {"count": 1, "inputs": {"weights": 1}}}, "protocol", "data.inputs.weights", "a map"),
    ({"data": {"count": 1, "inputs": {"weights": {"dtype": "float32", "shapes": b"",
     "data": [0, 0]}}}}, "request", "data.inputs.weights.shapes", "0 entries for 1 datum;"),
    ({"step": "first"}, "protocol", "step", "expected an integer"),
    ({"gradients": 1}, "protocol", "gradients", "expected a bool"),
]  # fmt: skip


class TestWhatBadInputGets:
    @pytest.mark.parametrize(
        ("change", "kind", "path", "message"), BAD_REQUESTS, ids=lambda value: str(value)[:50]
    )
    def test_a_bad_request(self, worker, change, kind, path, message):
        error = worker.error(**{**l2(), **change})
        assert error["kind"] == kind
        assert error["path"] == path
        assert message in error["message"]

    @pytest.mark.parametrize(
        ("fn", "error_type", "message"),
        [
            ("raises", "LookupError", "the moon is missing"),
            ("exits", "SystemExit", "3"),
            ("interrupts", "KeyboardInterrupt", ""),
            ("interrupts_while_awaited", "KeyboardInterrupt", ""),
            ("cancels", "asyncio.exceptions.CancelledError", ""),
            ("raises_base_exception", "pathological.Catastrophe", "quite unusual"),
            ("no_number", None, "expected a scalar torch.Tensor"),
            ("no_scalar", None, "shape [2]"),
            ("bad_metrics", None, 'the metric "text"'),
        ],
    )
    def test_a_bad_term(self, worker, fn, error_type, message):
        error = worker.error(**compute(f"pathological:{fn}"))
        assert error["kind"] == "term"
        assert error["term"] == "term"
        assert error["type"] == error_type
        assert message in error["message"]
        if error_type:
            assert f"in {fn}" in error["traceback"]

    def test_the_loop_of_async_terms_survives_all_of_that(self, worker):
        reply = worker.ask("compute", **compute("pathological:waits", params={"seconds": 0.0}))
        assert reply["op"] == "result"

    def test_a_nan_gradient_is_located(self, worker):
        logprobs = batch(torch.tensor([-1.0]), torch.tensor([[-1.0, -2.0]]))
        error = worker.error(**compute("pathological:nan_gradient", logprobs=logprobs))
        assert error["kind"] == "term"
        assert (error["term"], error["datum"], error["token"]) == ("term", 1, [0, 0])

    def test_a_term_that_outlives_its_timeout(self, worker):
        error = worker.error(**compute("pathological:waits_for_ever", timeout=0.05))
        assert error["kind"] == "deadline"
        assert error["term"] == "term"

    def test_a_term_in_a_process_that_crashes(self, worker):
        error = worker.error(**compute("pathological:crashes", run_in_executor="process"))
        assert error["kind"] == "term"
        assert "SIGSEGV" in error["message"]


class TestProtocolErrors:
    @pytest.mark.parametrize(
        ("frame", "message"),
        [
            (b"", "truncated"),
            (b"\xc1", "invalid opcode"),
            (b"junk", "expected a map as the whole message, got an integer"),
            (b"\xdf\xff\xff\xff\xff", "truncated"),
            (b"\xc6\xff\xff\xff\xff", "truncated"),
            (b"\xc6\x00\x00\x00\x01\x80", "truncated"),
            (b"\x81\xa2op\xa1\xff", "utf-8"),
            (b"\x81\xa1v" + b"\x91" * 2000 + b"\x01", "RecursionError"),
            (b"\x80\x00", "trailing characters"),
            (b"\x81\x01\x02", "expected a string as a key, got an integer"),
            (b"\x90", "expected a map as the whole message, got an array"),
            (b"\x80", 'the required key "op" is missing'),
            (pack({"op": "sing", "id": None}), 'needs an "id"'),
            (pack({"op": "ping"}), 'needs an "id"'),
            (pack({"op": "ping", "id": -1}), 'needs an "id"'),
            (pack({"op": "ping", "id": "1"}), 'needs an "id"'),
        ],
    )
    def test_a_frame_that_is_no_message(self, worker, frame, message):
        worker.send_frame(frame)
        reply = worker.receive()
        assert reply["op"] == "error"
        assert reply["id"] is None
        assert reply["error"]["kind"] == "protocol"
        assert message in reply["error"]["message"]

    def test_an_unknown_op_and_a_missing_op_are_told_under_their_id(self, worker):
        error = worker.error("sing")
        assert (error["kind"], error["path"]) == ("protocol", "op")
        worker.send_frame(pack({"id": 77}))
        reply = worker.receive()
        assert (reply["id"], reply["error"]["path"]) == (77, "op")

    def test_an_id_in_use_cannot_be_told_under_that_id(self, worker):
        first = started(worker, "waits_for_ever", "waiting")
        worker.send("compute", id=first, **l2())
        reply = worker.receive()
        assert reply["id"] is None
        assert reply["error"]["kind"] == "protocol"
        assert f"the id {first} is in use" in reply["error"]["message"]
        worker.send("cancel", id=first)
        assert worker.receive()["error"]["kind"] == "cancelled"

    def test_one_request_too_many_is_refused(self, worker):
        ids = [started(worker, "waits_for_ever", "waiting") for _ in range(4)]
        assert worker.ask("ping")["in_flight"] == 4
        reply = worker.ask("compute", **l2())
        assert reply["error"]["kind"] == "request"
        assert "4 requests are being computed already" in reply["error"]["message"]
        for request_id in ids:
            worker.send("cancel", id=request_id)
        assert {worker.receive()["id"] for _ in ids} == set(ids)

    def test_an_answer_over_the_limit_is_an_error_with_its_size(self):
        limit = 1 << 20
        with PortClient("--max-frame", str(limit)) as client:
            fits = (limit - 200) // 4  # a request holds less than an answer, beside its tensor
            error = client.error(**l2(logprobs=batch(torch.zeros(fits))))
            assert error["kind"] == "request"
            assert f"the limit is {limit}" in error["message"]

    def test_a_frame_over_the_limit_ends_the_worker_with_status_2(self):
        limit = 1 << 20
        with PortClient("--max-frame", str(limit)) as client:
            client.send_bytes(struct.pack(">I", limit + 1))
            reply = client.receive()
            assert reply["id"] is None
            assert f"{limit + 1} bytes" in reply["error"]["message"]
            assert client.receive() is None
            assert client.process.wait(30) == 2

    def test_a_length_alone_costs_no_memory(self, own):
        before = own.ask("ping")["rss"]
        own.send_bytes(struct.pack(">I", 1 << 30) + b"only this much comes")
        status = Path(f"/proc/{own.process.pid}/statm")
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            resident = int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            assert resident - before < 64 << 20


class TestCancel:
    @pytest.mark.parametrize(
        ("fn", "message"),
        [
            ("waits_for_ever", "waiting"),
            ("loops", "looping"),
            ("loops_over_tokens", "looping"),
            pytest.param(
                "loops_in_its_derivative",
                "looping",
                marks=pytest.mark.skipif(not fast(), reason="no derivative is asked"),
            ),
        ],
    )
    def test_a_request_is_withdrawn(self, worker, fn, message):
        request_id = started(worker, fn, message)
        worker.send("cancel", id=request_id)
        reply = worker.receive()
        assert reply["id"] == request_id
        assert reply["error"]["kind"] == "cancelled"

    def test_a_request_that_waits_for_its_turn_is_withdrawn(self, worker):
        looping = started(worker, "loops", "looping")
        waiting = worker.send("compute", **compute("pathological:harmless"))
        worker.send("cancel", id=waiting)
        assert worker.receive()["id"] == waiting
        worker.send("cancel", id=looping)
        assert worker.receive()["id"] == looping

    def test_it_never_reaches_the_next_request(self, worker):
        """Every request gets one answer, and what is not cancelled is computed."""
        spec = compute("pathological:harmless")
        for _ in range(300):
            first = worker.send("compute", **spec)
            worker.send("cancel", id=first)
            second = worker.send("compute", **spec)
            replies = {reply["id"]: reply for reply in (worker.receive(), worker.receive())}
            assert replies[second]["op"] == "result"
            outcome = replies[first]
            assert outcome["op"] == "result" or outcome["error"]["kind"] == "cancelled"

    def test_an_id_that_is_not_in_flight_is_ignored(self, worker):
        worker.send("cancel", id=12345)
        assert worker.ask("ping")["op"] == "result"


class TestWhatTermsPrintAndLog:
    def test_nothing_that_is_printed_reaches_the_stream(self, worker):
        assert worker.ask("compute", **compute("pathological:prints"))["op"] == "result"
        printed = worker.printed()
        for line in ("printed by Python", "to descriptor 1", "put by C", "echoed by"):
            assert line in printed

    def test_a_flood_on_descriptor_1_does_not_reach_it_either(self, worker):
        assert worker.ask("compute", **compute("pathological:floods"))["op"] == "result"
        assert "flood 99999\n" in worker.printed()

    def test_records_travel_with_level_logger_term_and_request_before_the_answer(self, worker):
        for _ in range(30):
            reply = worker.ask("compute", **compute("pathological:logs"))
            watch, warning, failed = worker.logs
            worker.logs.clear()
            assert watch == {
                "op": "log",
                "level": "warning",
                "logger": "my.term",
                "message": "watch out",
                "term": "term",
                "id": reply["id"],
            }
            assert warning["logger"] == "py.warnings"
            assert "this is deprecated" in warning["message"]
            assert failed["level"] == "error"
            assert "ValueError: inner" in failed["message"]

    def test_a_flood_of_records_is_bounded_and_what_is_dropped_is_counted(self, worker):
        worker.ask("compute", **compute("pathological:floods_log"))
        records = [log for log in worker.logs if log["logger"] == "flood"]
        notices = [log for log in worker.logs if "log records dropped" in log["message"]]
        dropped = sum(int(log["message"].split()[0]) for log in notices)
        assert len(records) + dropped == 20_000

    def test_a_record_whose_argument_logs_does_not_recurse(self, worker):
        worker.ask("compute", **compute("pathological:logs_recursively"))
        shown, dropped = worker.logs
        assert shown["message"] == "shown"
        assert dropped["message"].startswith("1 log records dropped")

    def test_standard_input_is_empty(self, worker):
        reply = worker.ask("compute", **compute("pathological:reads_stdin"))
        assert reply["record"]["regularizers"]["term"]["custom"] == {"read": 0}

    def test_children_do_not_inherit_the_stream(self, worker):
        before = len(worker.printed())
        worker.ask("compute", **compute("pathological:shows_its_descriptors"))
        links = worker.printed()[before:].splitlines()
        numbers = [link.split(" -> ")[0].split()[-1] for link in links if " -> " in link]
        assert numbers == ["0", "1", "2", "3"]
        assert "/proc/" in links[-1]  # 3 is what ls itself has opened


class TestTheEnd:
    @pytest.mark.parametrize(
        ("fn", "message"),
        [("swallows_everything", "looping"), ("sleeps", "sleeping")],
    )
    def test_it_is_gone_when_the_host_hangs_up(self, own, fn, message):
        started(own, fn, message)
        own.hang_up()
        own.process.wait(10)

    def test_neither_unread_frames_nor_unread_answers_keep_it(self, own):
        own.send("compute", **l2(logprobs=batch(torch.zeros(2_000_000))))
        own.send_bytes(struct.pack(">I", 1000) + b"half a frame")
        own.hang_up()
        own.process.wait(10)

    def test_it_is_gone_even_while_it_starts(self, tmp_path):
        never = tmp_path / "never_loads.py"
        never.write_text("import logging, time\nlogging.error('loading')\ntime.sleep(3600)\n")
        with PortClient(load=[str(never)], await_ready=False) as client:
            while not client.logs:
                with contextlib.suppress(TimeoutError):
                    client.receive(timeout=0.1)
            client.hang_up()
            client.process.wait(10)

    @pytest.mark.parametrize("how", ["hang_up", "kill"])
    def test_children_end_with_it(self, own, how):
        own.ask("compute", **compute("pathological:starts_a_child"))
        spec = compute("pathological:harmless", run_in_executor="process")
        assert own.ask("compute", **spec)["op"] == "result"
        own.hang_up() if how == "hang_up" else own.process.kill()
        own.process.wait(10)
        assert group_is_empty(own.ready["pid"])

    def test_it_is_gone_when_the_host_hangs_up_on_it_stopped(self, own):
        own.process.send_signal(signal.SIGSTOP)
        own.hang_up()
        own.process.wait(10)

    def test_it_ends_by_itself_where_its_guardian_was_killed(self, own):
        (guardian,) = set(group(own.ready["pid"])) - {own.ready["pid"]}
        os.kill(guardian, signal.SIGKILL)
        started(own, "sleeps", "sleeping")
        own.hang_up()
        own.process.wait(10)

    def test_it_dies_with_its_parent_while_c_code_holds_the_interpreter(self, tmp_path):
        script = (
            "import os, sys, signal\n"
            f"sys.path[:0] = [{str(HERE)!r}]\n"
            "from port_client import PATHOLOGICAL, PortClient, compute\n"
            "client = PortClient(load=[PATHOLOGICAL])\n"
            "client.send('compute', **compute('pathological:holds_the_interpreter'))\n"
            "try:\n"
            "    while True:\n"
            "        client.send('ping', id=10**6)\n"
            "        client.receive(timeout=2)\n"
            "except TimeoutError:\n"
            "    assert client.logs\n"
            "print(client.ready['pid'], flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "python")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert group_is_empty(int(done.stdout))

    def test_ctrl_c_is_not_for_it_and_sigterm_ends_it(self, own):
        own.process.send_signal(signal.SIGINT)
        own.assert_serving()
        started(own, "loops", "looping")
        own.process.send_signal(signal.SIGTERM)
        own.process.wait(10)
