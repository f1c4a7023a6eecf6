defmodule Tinkex.CustomLoss.Faults.StreamTest do
  # Nothing that a term says can corrupt the stream, delay others for good, or fill the memory.
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog
  import Tinkex.CustomLoss.Bridge

  @moduletag timeout: 180_000

  @mib 1024 * 1024

  setup_all do
    %{pool: start_terms!(["floods.py", "pathological.py"])}
  end

  setup %{pool: pool} do
    await_all(pool)
    [os_pid] = os_pids(pool)
    on_exit(fn -> assert group(os_pid) != [] end)
    %{os_pid: os_pid}
  end

  # The most memory that the BEAM and a Python process had while `fun` ran, beyond what they had.
  defp growth(os_pid, fun) do
    beam = :erlang.memory(:total)
    python = resident(os_pid)
    task = Task.async(fun)
    {peak_beam, peak_python} = watch(task, os_pid, {beam, python})
    {Task.await(task), peak_beam - beam, peak_python - python}
  end

  defp watch(task, os_pid, {beam, python} = peaks) do
    if Process.alive?(task.pid) do
      Process.sleep(20)
      watch(task, os_pid, {max(beam, :erlang.memory(:total)), max(python, resident(os_pid))})
    else
      peaks
    end
  end

  test "print, os.write(1), C's puts, a subprocess", %{pool: pool, os_pid: os_pid} do
    assert square(pool, "pathological:prints") == {:ok, 5.0}
    assert_squaring(pool)
    assert os_pids(pool) == [os_pid]
  end

  test "a million lines of all four; others are answered", %{pool: pool, os_pid: os_pid} do
    flood = fn -> square(pool, "floods:prints_a_million_lines", timeout: 120_000) end
    {answer, beam, python} = growth(os_pid, flood)
    assert answer == {:ok, 5.0}
    assert beam < 64 * @mib
    assert python < 64 * @mib
    assert_squaring(pool)
    assert os_pids(pool) == [os_pid]
  end

  test "log records without pause; others are answered meanwhile", %{pool: pool, os_pid: os_pid} do
    log =
      capture_log(fn ->
        flood = fn -> square(pool, "floods:logs_without_pause", timeout: 120_000) end

        {answer, beam, python} =
          growth(os_pid, fn ->
            task = Task.async(flood)
            eventually(fn -> match?({:ok, %{in_flight: 1}}, Tinkex.CustomLoss.info(pool)) end)
            # An async term does not wait for its turn on the interpreter that inline ones take.
            assert square(pool, "pathological:squares_async", timeout: 30_000) == {:ok, 5.0}
            Task.await(task, 120_000)
          end)

        assert answer == {:ok, 5.0}
        assert beam < 200 * @mib
        assert python < 64 * @mib
      end)

    assert log =~ "record 0"
    assert log =~ "dropped" or log =~ "left out"
    assert_squaring(pool)
    assert os_pids(pool) == [os_pid]
  end

  test "logging, which arrives with level, logger and term", %{pool: pool} do
    log =
      capture_log([format: "$level $metadata$message\n", metadata: [:python_logger, :term]], fn ->
        assert square(pool, "pathological:logs") == {:ok, 5.0}
      end)

    assert log =~ ~r/warn(ing)? python_logger=my.losses term=base_loss the loss is odd/
    assert_squaring(pool)
  end
end
