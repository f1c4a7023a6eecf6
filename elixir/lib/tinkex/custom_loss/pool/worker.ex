defmodule Tinkex.CustomLoss.Pool.Worker do
  @moduledoc false
  # One operating system's process at a time, and the routing of what it answers.
  #
  #     down ──open──▶ starting ──`ready`──▶ ready
  #       ▲                │                   │
  #       └──── backoff ───┴───────────────────┘   whatever goes wrong
  #
  # Callers write their requests to the port themselves, after they told this process which alias
  # waits for the answer; so nothing large passes through here on its way out, and what comes in is
  # a reference to the frame. The Python process is never repaired: it is killed and another one
  # started, and the requests it had are told that they are lost, to be tried elsewhere.

  @behaviour :gen_statem

  alias Tinkex.CustomLoss.{Pool, Telemetry, WorkerError}
  alias Tinkex.CustomLoss.Pool.{Log, Python, Reaper}
  alias Tinkex.CustomLoss.Wire.Protocol

  # A frame up to this size is written by the caller. A larger one, of which the emulator copies
  # what the pipe does not take, and any frame for a pipe that is full are left to a process of
  # their own: a caller that is inside Port.command cannot notice its deadline.
  @small 262_144

  # For so many intervals a ping may be unanswered. One that computes gets long, since code that holds
  # the interpreter's lock cannot be told from a process that hangs; but not for ever, since its
  # requests may have no deadline, and a part of a frame would keep all that follows it.
  @missed_pings 2
  @missed_pings_busy 12

  def child_spec({index, _pool, _reaper, _config} = arg),
    do: %{id: {__MODULE__, index}, start: {__MODULE__, :start_link, [arg]}}

  def start_link(arg), do: :gen_statem.start_link(__MODULE__, arg, [])

  @doc """
  Sends a request that the pool granted; called by the process that waits for the answer.

  The answer comes as one of

    * `{alias, {:result, map}}`, `{alias, {:error, map}}` - what Python answered
    * `{alias, {:lost, reason}}` - the worker ended with it
    * `{alias, :unsent}` - the worker had ended before it
  """
  def request(worker, port, id, reply_to, frame, size) do
    send(worker, {:expect, port, id, reply_to})
    # Not linked to the caller: what the worker expects is always written.
    if size <= @small, do: write(port, frame), else: spawn(fn -> command(port, frame) end)
    :ok
  end

  @doc "Gives up the answer to a request: Python is told to stop, and killed if it does not."
  def abandon(worker, id), do: send(worker, {:abandon, id})

  defp write(port, frame) do
    unless command(port, frame, [:nosuspend]), do: spawn(fn -> command(port, frame) end)
    :ok
  end

  # A closed port is no news: its worker tells everyone who waits.
  defp command(port, frame, options \\ []) do
    Port.command(port, frame, options)
  rescue
    ArgumentError -> true
  end

  @impl true
  def callback_mode, do: :handle_event_function

  @impl true
  def init({index, pool, reaper, config}) do
    Process.flag(:trap_exit, true)

    data = %{
      index: index,
      pool: pool,
      reaper: reaper,
      config: config,
      port: nil,
      os_pid: nil,
      # id => alias of who waits, or :abandoned
      requests: %{},
      ping: nil,
      missed_pings: 0,
      failures: 0,
      opened: nil,
      log: Log.new(index)
    }

    {:ok, :down, data, {:next_event, :internal, :open}}
  end

  @impl true
  def handle_event(:internal, :open, :down, data), do: open(data)
  def handle_event({:timeout, :backoff}, :open, :down, data), do: open(data)

  # From callers and the pool

  def handle_event(:info, {:expect, port, id, reply_to}, :ready, %{port: port} = data),
    do: {:keep_state, put_in(data.requests[id], reply_to)}

  def handle_event(:info, {:expect, _port, _id, reply_to}, _state, _data) do
    send(reply_to, {reply_to, :unsent})
    :keep_state_and_data
  end

  def handle_event(:info, {:abandon, id}, _state, %{requests: requests} = data)
      when is_map_key(requests, id) do
    write(data.port, Protocol.encode_cancel(id))
    grace = {{:timeout, {:grace, id}}, data.config.grace, :overdue}
    {:keep_state, put_in(data.requests[id], :abandoned), grace}
  end

  # Granted but never written, or answered already.
  def handle_event(:info, {:abandon, id}, _state, data) do
    Pool.done(data.pool, id)
    :keep_state_and_data
  end

  # From Python

  def handle_event(:info, {port, {:data, frame}}, state, %{port: port} = data),
    do: frame |> Protocol.decode() |> received(state, data)

  # Ended by a signal, it has nothing to say about what it lacks.
  def handle_event(:info, {port, {:exit_status, status}}, :starting, %{port: port} = data)
      when status < 128 do
    %WorkerError{reason: reason} = Python.diagnose(data.config, status)
    ended(reason, data)
  end

  def handle_event(:info, {port, {:exit_status, status}}, _state, %{port: port} = data),
    do: ended({:exited, status}, data)

  # Python closed its end; the exit status is usually a moment away and says more.
  def handle_event(:info, {:EXIT, port, reason}, _state, %{port: port}),
    do: {:keep_state_and_data, {{:timeout, :closed}, 200, {:port, reason}}}

  # From a port that was replaced.
  def handle_event(:info, {port, _message}, _state, _data) when is_port(port),
    do: :keep_state_and_data

  def handle_event(:info, {:EXIT, port, _reason}, _state, _data) when is_port(port),
    do: :keep_state_and_data

  # Time

  def handle_event(:state_timeout, :not_ready, :starting, data) do
    seconds = data.config.start_timeout / 1000

    ended(
      {:not_started,
       "Python was not ready after #{seconds} s and was killed; raise :start_timeout if what is " <>
         "in :load takes that long to import"},
      data
    )
  end

  def handle_event({:timeout, {:grace, _id}}, :overdue, _state, data), do: ended(:overdue, data)
  def handle_event({:timeout, :closed}, reason, _state, data), do: ended(reason, data)
  def handle_event({:timeout, :ping}, :ping, :ready, data), do: ping(data)

  @impl true
  # The supervisor stops the worker. The reaper sees it and ends the process.
  def terminate(_reason, _state, _data), do: :ok

  defp open(data) do
    case Python.open(data.config, Python.worker_args(data.config)) do
      {:ok, port, os_pid} ->
        if os_pid, do: Reaper.watch(data.reaper, os_pid)
        Pool.worker(data.pool, data.index, {:starting, os_pid})
        data = %{data | port: port, os_pid: os_pid, opened: System.monotonic_time()}
        {:next_state, :starting, data, {:state_timeout, data.config.start_timeout, :not_ready}}

      {:error, %WorkerError{reason: reason}} ->
        ended(reason, data)
    end
  end

  defp received({:log, record}, _state, data),
    do: {:keep_state, %{data | log: Log.write(data.log, record)}}

  defp received({:ready, %{protocol: version} = ready}, :starting, data) do
    if version == Protocol.version() do
      duration = System.monotonic_time() - data.opened
      Pool.worker(data.pool, data.index, {:ready, data.port, ready})

      Telemetry.worker_up(data.config, data.index, %{
        duration: duration,
        os_pid: data.os_pid,
        versions: Map.take(ready, [:package, :python, :torch, :tinker])
      })

      data = %{data | ping: nil, missed_pings: 0}
      {:next_state, :ready, data, next_ping(data)}
    else
      ended({:not_started, version_mismatch(version)}, data)
    end
  end

  defp received({:result, id, pong}, :ready, %{ping: id} = data) do
    Pool.worker(data.pool, data.index, {:alive, pong})
    {:keep_state, %{data | ping: nil, missed_pings: 0}}
  end

  defp received({:result, id, result}, :ready, data), do: answer(id, {:result, result}, data)

  defp received({:error, id, error}, :ready, data) when id != nil,
    do: answer(id, {:error, error}, data)

  defp received({:error, nil, %{message: sentence, traceback: traceback}}, :starting, data) do
    sentence = if traceback, do: "#{sentence}\n\n#{traceback}", else: sentence
    ended({:not_started, sentence}, data)
  end

  defp received({:error, _id, %{message: sentence}}, _state, data),
    do: ended({:protocol, sentence}, data)

  defp received({:invalid, sentence}, _state, data), do: ended({:protocol, sentence}, data)

  defp received({_op, _unexpected}, _state, data),
    do: ended({:protocol, "the worker said twice that it is ready"}, data)

  defp received({_op, _id, _answer}, _state, data),
    do: ended({:protocol, "the worker answered before it was ready"}, data)

  defp answer(id, reply, data) do
    case Map.pop(data.requests, id) do
      {nil, _requests} ->
        ended({:protocol, "the worker answered #{id}, which nobody asked"}, data)

      {reply_to, requests} ->
        if reply_to != :abandoned, do: send(reply_to, {reply_to, reply})
        Pool.done(data.pool, id)
        data = %{data | requests: requests, failures: 0}

        if reply_to == :abandoned,
          do: {:keep_state, data, {{:timeout, {:grace, id}}, :cancel}},
          else: {:keep_state, data}
    end
  end

  defp ping(%{ping: nil} = data) do
    id = System.unique_integer([:positive])
    write(data.port, Protocol.encode_ping(id))
    # Nothing here makes garbage fast enough to let go of the frames that passed.
    :erlang.garbage_collect()
    {:keep_state, %{data | ping: id}, next_ping(data)}
  end

  defp ping(%{requests: requests, missed_pings: missed} = data) do
    limit = if requests == %{}, do: @missed_pings, else: @missed_pings_busy

    if missed + 1 >= limit,
      do: ended(:unresponsive, data),
      else: {:keep_state, %{data | missed_pings: missed + 1}, next_ping(data)}
  end

  defp next_ping(data), do: {{:timeout, :ping}, data.config.ping_interval, :ping}

  # The pool first, so that it does not count on this worker when those who are told come back.
  defp ended(reason, data) do
    if data.port, do: close(data.port)
    if data.os_pid, do: Reaper.kill(data.reaper, data.os_pid)
    delay = backoff(data.config.backoff, data.failures)
    Pool.worker(data.pool, data.index, {:down, reason, delay})
    Telemetry.worker_down(data.config, data.index, reason, data.os_pid, delay)
    Log.worker_down(data.index, reason, data.os_pid, delay)

    for {_id, reply_to} <- data.requests,
        reply_to != :abandoned,
        do: send(reply_to, {reply_to, {:lost, reason}})

    timers = for name <- timers(data.requests), do: {{:timeout, name}, :cancel}

    data = %{
      data
      | port: nil,
        os_pid: nil,
        requests: %{},
        ping: nil,
        failures: data.failures + 1
    }

    {:next_state, :down, data, [{{:timeout, :backoff}, delay, :open} | timers]}
  end

  defp timers(requests),
    do: [:ping, :closed | for({id, :abandoned} <- requests, do: {:grace, id})]

  defp close(port) do
    Port.close(port)
  rescue
    ArgumentError -> true
  end

  defp backoff({first, longest}, failures),
    do: min(longest, first * Integer.pow(2, min(failures, 30)))

  defp version_mismatch(version) do
    ours = Protocol.version()

    {older, what} =
      if version < ours,
        do: {"Python package tinker-custom-loss", "pip install --upgrade tinker-custom-loss"},
        else: {"Elixir package tinkex_custom_loss", "mix deps.update tinkex_custom_loss"}

    "the worker speaks version #{version} of the protocol, this side version #{ours}: " <>
      "the #{older} is older; run: #{what}"
  end
end
