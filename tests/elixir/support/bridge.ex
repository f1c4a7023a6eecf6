defmodule Tinkex.CustomLoss.Bridge do
  @moduledoc false
  # What the tests of both languages share: pools of misbehaving workers, and their processes.

  import ExUnit.Assertions
  import ExUnit.Callbacks

  alias Tinkex.CustomLoss

  @fixtures Path.expand("../../bridge/fixtures", __DIR__)

  @doc "A file among the fixtures."
  def fixture(name), do: Path.join(@fixtures, name)

  @doc "Starts a pool whose Python is a script of the fixtures, with impatient options."
  def start_peers!(script, opts \\ []) do
    defaults = [
      python: fixture(script),
      await_ready: true,
      grace: 300,
      backoff: {10, 200},
      start_timeout: 20_000
    ]

    start_pool!(Keyword.merge(defaults, opts))
  end

  @doc "Starts a pool of the Python that the documented order finds; returns its pid."
  def start_pool!(opts), do: start_supervised!({CustomLoss, opts})

  @doc "Starts a pool for as long as the calling process lives, on whichever node; tells `listener`."
  def keep_pool(opts, listener) do
    {:ok, pool} = CustomLoss.start_link(opts)
    send(listener, {:pool, pool})
    Process.sleep(:infinity)
  end

  @doc "Asks a peer to answer with `step` as the loss."
  def ask(pool, step, opts \\ []) do
    opts = Keyword.merge([base_loss: :l2, step: step], opts)

    with {:ok, output} <- CustomLoss.compute(pool, nil, [[-1.0, -2.0]], opts) do
      assert output.gradients == [[-1.0, -2.0]]
      {:ok, output.loss_total}
    end
  end

  @doc "Three calls succeed."
  def assert_serving(pool) do
    for step <- [11, 12, 13], do: assert(ask(pool, step) == {:ok, step * 1.0})
  end

  @doc "The operating system's pids of the workers that have one."
  def os_pids(pool) do
    {:ok, info} = CustomLoss.info(pool)
    for %{os_pid: os_pid} when os_pid != nil <- info.workers, do: os_pid
  end

  @doc "Whether the process runs: one that ended but was not yet waited for does not."
  def alive?(os_pid) do
    case System.cmd("ps", ["-o", "stat=", "-p", "#{os_pid}"], stderr_to_stdout: true) do
      {stat, 0} -> not String.starts_with?(stat, "Z")
      {_none, _status} -> false
    end
  end

  @doc "Passes as soon as `fun` is true; fails if it is not within `ms`."
  def eventually(fun, ms \\ 5_000) do
    cond do
      fun.() ->
        :ok

      ms <= 0 ->
        flunk("did not become true in time")

      true ->
        Process.sleep(20)
        eventually(fun, ms - 20)
    end
  end

  @doc "The milliseconds that `fun` took, and what it returned."
  def timed(fun) do
    {microseconds, result} = :timer.tc(fun)
    {microseconds / 1000, result}
  end
end
