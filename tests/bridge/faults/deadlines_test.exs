defmodule Tinkex.CustomLoss.Faults.DeadlinesTest do
  # What terms may do to a deadline, in the real Python.
  use ExUnit.Case, async: false

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.TimeoutError

  @moduletag timeout: 180_000

  @holds "holds_the_interpreter:holds_the_interpreter"

  setup_all do
    %{pool: start_terms!(["holds_the_interpreter.py", "pathological.py"], grace: 1_500)}
  end

  setup %{pool: pool} do
    await_all(pool)
    [os_pid] = os_pids(pool)
    %{os_pid: os_pid}
  end

  defp sixteen_mib(pool) do
    logprobs = [{:binary.copy(<<0::32>>, 4_194_304), [4_194_304]}]
    CustomLoss.compute(pool, nil, logprobs, base_loss: :l2, timeout: 300)
  end

  defp hold(pool, milliseconds) do
    params = %{milliseconds: milliseconds}
    task = Task.async(fn -> square(pool, {@holds, params}, timeout: 20_000) end)
    eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
    # It cannot say that it holds it.
    Process.sleep(200)
    task
  end

  test "16 MB on their way to a worker that reads again in time: nobody is troubled",
       %{pool: pool, os_pid: os_pid} do
    held = hold(pool, 1_200)
    assert {:error, %TimeoutError{timeout: 300, stage: :computing}} = sixteen_mib(pool)
    refute Task.yield(held, 0)

    assert Task.await(held, 30_000) == {:ok, 5.0}
    assert_squaring(pool)
    assert os_pids(pool) == [os_pid]
    assert Process.info(self(), :messages) == {:messages, []}
  end

  test "16 MB on their way to a worker that never reads again: it is replaced, both are answered",
       %{pool: pool, os_pid: os_pid} do
    held = hold(pool, 3_000)
    assert {:error, %TimeoutError{timeout: 300, stage: :computing}} = sixteen_mib(pool)
    refute Task.yield(held, 0)

    # 1.5 s later the worker is ended, and what else it had tried again.
    assert Task.await(held, 30_000) == {:ok, 5.0}
    assert_gone(os_pid)
    assert_squaring(pool)
  end

  test "a term that swallows what interrupts it is ended with its process",
       %{pool: pool, os_pid: os_pid} do
    assert {:error, %TimeoutError{stage: :computing}} =
             square(pool, "pathological:swallows_interrupts", timeout: 200)

    assert alive?(os_pid)
    assert_gone(os_pid, 1_500 + 2_000)
    assert_squaring(pool)
  end

  test "an answer that is late by a moment reaches nobody", %{pool: pool, os_pid: os_pid} do
    term = {@holds, %{milliseconds: 1_000}}
    assert {:error, %TimeoutError{}} = square(pool, term, timeout: 200)
    assert {:ok, %{in_flight: 1}} = CustomLoss.info(pool)
    eventually(fn -> match?({:ok, %{in_flight: 0}}, CustomLoss.info(pool)) end)
    assert_squaring(pool)
    assert os_pids(pool) == [os_pid]
    assert Process.info(self(), :messages) == {:messages, []}
  end

  test "a caller that dies cancels a loop; the worker goes on", %{pool: pool, os_pid: os_pid} do
    caller = spawn(fn -> square(pool, "pathological:loops", timeout: :infinity) end)
    eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
    Process.exit(caller, :kill)
    eventually(fn -> match?({:ok, %{in_flight: 0}}, CustomLoss.info(pool)) end, 1_500)
    assert_squaring(pool)
    assert os_pids(pool) == [os_pid]
  end
end
