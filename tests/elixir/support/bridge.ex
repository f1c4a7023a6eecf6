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

  @doc "Starts a BEAM of its own, which has the code of this one; see `:peer`."
  def start_beam! do
    paths = Enum.flat_map(:code.get_path(), &[~c"-pa", &1])
    {:ok, peer, _node} = :peer.start(%{connection: :standard_io, args: paths})
    {:ok, _} = :peer.call(peer, Application, :ensure_all_started, [:elixir])
    peer
  end

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

  @doc """
  Starts a pool of the real Python with the terms of some fixtures.

  What they print is dropped.
  """
  def start_terms!(files, opts \\ []) do
    {:ok, python} = Tinkex.CustomLoss.Pool.Python.find(nil)
    python |> terms_opts(files) |> Keyword.merge(opts) |> start_pool!()
  end

  defp terms_opts(python, files) do
    [
      python: fixture("quiet_python.sh"),
      env: %{"REAL_PYTHON" => python},
      load: Enum.map(files, &fixture/1),
      await_ready: true,
      grace: 300,
      backoff: {10, 200}
    ]
  end

  @doc """
  Starts a pool for each of the named states in a BEAM that is to be killed, and brings its worker
  there; returns the pids of the workers.

  One after another, because torch takes a while to import.
  """
  def occupy_all(python, files, states) do
    me = self()

    # Pools end with the process that started them, and the one that runs this ends when it returns.
    spawn(fn ->
      workers =
        for {name, {calls, stuck}} <- states do
          # One that holds the interpreter's lock would be replaced while the others start.
          opts = [ping_interval: 300_000] ++ terms_opts(python, files)
          {:ok, pool} = CustomLoss.start_link(opts)
          {name, occupy(pool, calls, stuck)}
        end

      send(me, {:workers, workers})
      Process.sleep(:infinity)
    end)

    receive do
      {:workers, workers} -> workers
    end
  end

  @doc "Makes calls that return, and one that does not; returns the pid of the pool's worker."
  def occupy(pool, calls, stuck) do
    for term <- calls, do: {:ok, 5.0} = square(pool, term)

    if stuck do
      spawn(fn -> square(pool, stuck, timeout: :infinity) end)
      eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
      # A term that holds the interpreter's lock cannot say that it does.
      Process.sleep(300)
    end

    [os_pid] = os_pids(pool)
    os_pid
  end

  @doc "Asks for Σ x² of [-1, -2] as computed by a loaded term, which is then 5 with gradient 2x."
  def square(pool, term, opts \\ []) do
    opts = if term, do: Keyword.put_new(opts, :base_loss, term), else: opts

    with {:ok, output} <- CustomLoss.compute(pool, nil, [[-1.0, -2.0]], opts) do
      assert output.gradients == [[-2.0, -4.0]]
      {:ok, output.loss_total}
    end
  end

  @doc "Three calls of the real Python succeed."
  def assert_squaring(pool),
    do: for(_ <- 1..3, do: assert(square(pool, {:l2, %{reduction: "token_sum"}}) == {:ok, 5.0}))

  @doc "Waits until every worker of the pool is ready, and for nothing."
  def await_all(pool) do
    eventually(
      fn ->
        {:ok, info} = CustomLoss.info(pool)
        info.in_flight == 0 and Enum.all?(info.workers, &(&1.state == :ready))
      end,
      60_000
    )
  end

  @doc "The processes of a worker, itself and what it started, that run."
  def group(os_pid) do
    for directory <- Path.wildcard("/proc/[0-9]*"),
        {:ok, stat} <- [File.read(Path.join(directory, "stat"))],
        # The name, in parentheses, may hold anything.
        [state, _parent, group | _] = stat |> String.split(") ") |> List.last() |> String.split(),
        group == "#{os_pid}" and state not in ["Z", "X"],
        do: directory |> Path.basename() |> String.to_integer()
  end

  @doc "Resident bytes of a process."
  def resident(os_pid) do
    [_size, pages | _] = "/proc/#{os_pid}/statm" |> File.read!() |> String.split()
    String.to_integer(pages) * 4096
  end

  @doc "Nothing is left of a worker within `ms`: not the process, and not what it started."
  def assert_gone(os_pids, ms \\ 2_000),
    do: eventually(fn -> Enum.all?(List.wrap(os_pids), &(group(&1) == [])) end, ms)

  @doc "Sends a signal to a process."
  def signal(os_pid, name), do: System.cmd("/bin/sh", ["-c", "kill -#{name} #{os_pid}"])

  @doc "The operating system's pids of the workers that have one."
  def os_pids(pool) do
    {:ok, info} = CustomLoss.info(pool)
    for %{os_pid: os_pid} when os_pid != nil <- info.workers, do: os_pid
  end

  @doc "The Erlang processes of a pool, but for its supervisors."
  def processes(supervisor) do
    for {_, pid, type, _} <- Supervisor.which_children(supervisor),
        process <- if(type == :supervisor, do: processes(pid), else: [pid]),
        is_pid(process),
        do: process
  end

  @doc """
  Calls `handler` for the events of `:telemetry`, by a stand-in where the library is not there.
  Returns what ends it.
  """
  def handle_telemetry(events, handler) do
    end_stand_in = ensure_telemetry()
    id = {__MODULE__, make_ref()}
    :ok = apply(:telemetry, :attach_many, [id, events, handler, nil])

    fn ->
      apply(:telemetry, :detach, [id])
      end_stand_in.()
    end
  end

  @doc "Makes a stand-in for `:telemetry` where it is not there. Returns what ends it."
  def ensure_telemetry do
    if Code.ensure_loaded?(:telemetry) do
      fn -> :ok end
    else
      create_telemetry()

      fn ->
        :persistent_term.erase(__MODULE__)
        :code.purge(:telemetry)
        :code.delete(:telemetry)
      end
    end
  end

  defp create_telemetry do
    Module.create(
      :telemetry,
      quote do
        @key unquote(__MODULE__)

        def attach_many(id, events, handler, config) do
          :persistent_term.put(@key, Map.put(handlers(), id, {events, handler, config}))
        end

        def detach(id), do: :persistent_term.put(@key, Map.delete(handlers(), id))

        def execute(event, measurements, metadata) do
          for {_id, {events, handler, config}} <- handlers(),
              event in events,
              do: handler.(event, measurements, metadata, config)

          :ok
        end

        defp handlers, do: :persistent_term.get(@key, %{})
      end,
      Macro.Env.location(__ENV__)
    )
  end

  @doc "Whether the process runs: one that ended but was not yet waited for does not."
  def alive?(os_pid) do
    case System.cmd("ps", ["-o", "stat=", "-p", "#{os_pid}"], stderr_to_stdout: true) do
      {stat, 0} -> not String.starts_with?(stat, "Z")
      {_none, _status} -> false
    end
  end

  @doc "Passes as soon as `fun` is true; fails if it is not within `ms`."
  def eventually(fun, ms \\ 5_000, otherwise \\ "did not become true in time") do
    cond do
      fun.() ->
        :ok

      ms <= 0 ->
        flunk(otherwise)

      true ->
        Process.sleep(20)
        eventually(fun, ms - 20, otherwise)
    end
  end

  @doc "The milliseconds that `fun` took, and what it returned."
  def timed(fun) do
    {microseconds, result} = :timer.tc(fun)
    {microseconds / 1000, result}
  end
end
