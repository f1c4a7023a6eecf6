# Several callers of one pool.
#
#     pool_scaling          calls a second of two workers, over those of one, with a term that
#                           computes in Python: one process has one lock, so more are needed. A term
#                           of torch's already fills both cores from the threads of one worker
#     pool_scaling_bare     the same of two processes that only call that term, over one: what the
#                           machine has to give at the time
#     cpu_beam, cpu_python  milliseconds of processor time a call of 100,000 values, one L2 term
#     head_of_line          median of a call of 1,000 values while another process keeps computing
#                           4,000,000, over its median alone; a pool of two workers
#     head_of_line_single   the same on one worker, which computes both side by side
#
#     mix run tests/bench/pool.exs

for file <- ["figures.exs", "batch.exs"], do: Code.require_file(file, __DIR__)

defmodule Bench.Pool do
  alias Bench.{Batch, Figures}
  alias Tinkex.CustomLoss

  @calls 40
  @rounds 6
  @cheap_calls 500

  def run do
    scaling()
    processor_time()
    head_of_line("head_of_line", 2, 2)
    head_of_line("head_of_line_single", 1, nil)
  end

  defp scaling do
    source = Path.join(__DIR__, "gil_bound.py")
    term = %{name: "recursion", fn: "gil_bound:recursion", weight: 1.0}
    batch = Batch.new(1_000)
    ports = for _ <- 1..2, do: open(source)

    ways =
      for workers <- [1, 2] do
        pool = start(workers, load: [source])

        calls = fn ->
          1..@calls
          |> Task.async_stream(fn _ -> compute(pool, batch, regularizers: [term]) end,
            max_concurrency: 4,
            timeout: :infinity
          )
          |> Stream.run()
        end

        {:"workers_#{workers}", calls}
      end

    bare = [
      bare_1: fn -> call(Enum.take(ports, 1), @calls) end,
      bare_2: fn -> call(ports, div(@calls, 2)) end
    ]

    ms = Figures.medians("pool_scaling", ways ++ bare, @rounds)
    Figures.figure("pool_scaling", ms[:workers_1] / ms[:workers_2], 1.8, :at_least)
    Figures.figure("pool_scaling_bare", ms[:bare_1] / ms[:bare_2])
    Enum.each(ports, &Port.close/1)
  end

  defp open(source) do
    python = System.fetch_env!("TINKEX_CUSTOM_LOSS_PYTHON")
    Port.open({:spawn_executable, python}, [:binary, line: 80, args: [source]])
  end

  # By each of these processes, at the same time.
  defp call(ports, calls) do
    for port <- ports, do: Port.command(port, "#{calls}\n")

    for port <- ports do
      receive do
        {^port, {:data, {:eol, "done"}}} -> :ok
      end
    end
  end

  defp processor_time do
    pool = start(1)
    {:ok, %{workers: [%{os_pid: python}]}} = CustomLoss.info(pool)
    batch = Batch.new(100_000)
    for _ <- 1..100, do: compute(pool, batch)

    before = Enum.map([System.pid(), python], &processor_ms/1)
    for _ <- 1..@cheap_calls, do: compute(pool, batch)
    since = Enum.map([System.pid(), python], &processor_ms/1)

    [beam, python] = Enum.zip_with(since, before, &((&1 - &2) / @cheap_calls))
    Figures.figure("cpu_beam", beam, 0.29)
    Figures.figure("cpu_python", python, 0.45)
  end

  defp head_of_line(name, workers, target) do
    pool = start(workers)
    [small, large] = for values <- [1_000, 4_000_000], do: Batch.new(values)
    small_call = fn -> compute(pool, small) end
    for _ <- 1..5, batch <- [small, large], do: compute(pool, batch)

    alone = median_of(400, small_call)
    busy = Task.async(fn -> Stream.repeatedly(fn -> compute(pool, large) end) |> Stream.run() end)
    for _ <- 1..20, do: small_call.()
    behind = median_of(400, small_call)
    Task.shutdown(busy, :brutal_kill)

    Figures.detail(
      "#{name}: behind #{Figures.digits(behind)}, alone #{Figures.digits(alone)} ms, medians of 400"
    )

    Figures.figure(name, behind / alone, target)
  end

  defp median_of(rounds, call),
    do: Figures.median(for _ <- 1..rounds, do: Figures.milliseconds(call))

  defp compute(pool, batch, options \\ Batch.options(:l2)),
    do: {:ok, _} = CustomLoss.compute(pool, nil, Batch.logprobs(batch), options)

  # Until all of its workers are ready, not only the first.
  defp start(workers, options \\ []) do
    {:ok, pool} = CustomLoss.start_link([workers: workers, await_ready: true] ++ options)
    await(pool)
    pool
  end

  defp await(pool) do
    {:ok, %{workers: workers}} = CustomLoss.info(pool)

    unless Enum.all?(workers, &(&1.state == :ready)) do
      Process.sleep(50)
      await(pool)
    end
  end

  # User and system time of all threads, in ticks of 10 ms.
  defp processor_ms(pid) do
    [_, fields] = "/proc/#{pid}/stat" |> File.read!() |> String.split(") ", parts: 2)
    [user, system] = fields |> String.split() |> Enum.slice(11, 2)
    10.0 * (String.to_integer(user) + String.to_integer(system))
  end
end

Bench.Pool.run()
