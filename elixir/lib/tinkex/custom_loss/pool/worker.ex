defmodule Tinkex.CustomLoss.Pool.Worker do
  @moduledoc false
  # One operating system's process at a time, and the requests that it has.
  #
  #     down ──open──▶ starting ──`ready`──▶ ready
  #       ▲                │                   │
  #       └──── backoff ───┴───────────────────┘   whatever goes wrong, and :restart
  #
  # And of a request, whose answer goes straight to who waits for it:
  #
  #     in the outbox ──▶ with Python ──▶ answered
  #           │               │              ▲
  #     deadline passed, or its caller gone  │
  #           ▼               ▼              │
  #       forgotten       withdrawn ─────────┘   Python is told to stop
  #                           └──grace──▶ down   and did not
  #
  # The Python process is never repaired: it is killed and another one started, and what becomes of the
  # requests that it had is for the pool to say.

  @behaviour :gen_statem

  alias Tinkex.CustomLoss.{Pool, Telemetry, WorkerError}
  alias Tinkex.CustomLoss.Pool.{Log, Memory, Outbox, Python}
  alias Tinkex.CustomLoss.Wire.Protocol

  # For so many intervals a ping may be unanswered. One that computes gets long, since code that holds
  # the interpreter's lock cannot be told from a process that hangs; but not for ever, since its
  # requests may have no deadline, and a part of a frame would keep all that follows it.
  @missed_pings 2
  @missed_pings_busy 12

  def child_spec({index, _pool, _config} = arg),
    do: %{id: {__MODULE__, index}, start: {__MODULE__, :start_link, [arg]}}

  def start_link(arg), do: :gen_statem.start_link(__MODULE__, arg, [])

  @doc """
  Gives a worker the request of a `t:Tinkex.CustomLoss.Pool.request/0`.

  `port` is what the worker said that it is ready with: if that is no more, the request was never here.
  """
  def request(worker, port, request), do: send(worker, {:request, port, request})

  @doc "Ends the Python process for a `reason`, and starts another one at once."
  def restart(worker, reason), do: send(worker, {:restart, reason})

  @impl true
  def callback_mode, do: :handle_event_function

  @impl true
  def init({index, pool, config}) do
    Process.flag(:trap_exit, true)
    Process.put(:"$process_label", {__MODULE__, config.name, index})

    data = %{
      index: index,
      pool: pool,
      config: config,
      port: nil,
      os_pid: nil,
      outbox: nil,
      memory: Memory.none(),
      # id => {alias of who waits, monitor of the caller}, or :withdrawn
      requests: %{},
      ping: nil,
      missed_pings: 0,
      failures: 0,
      opened: nil,
      log: Log.new(config.name, index)
    }

    {:ok, :down, data, {{:timeout, :backoff}, 0, :open}}
  end

  @impl true
  def handle_event({:timeout, :backoff}, :open, :down, data), do: open(data)

  # From the pool

  def handle_event(:info, {:request, port, request}, :ready, %{port: port} = data) do
    %{id: id, caller: caller} = request
    monitor = :erlang.monitor(:process, caller, tag: {:gone, id})
    data = put_in(data.requests[id], {request.reply_to, monitor})
    deadline = {{:timeout, {:request, id}}, Pool.remaining(request.deadline), :deadline}
    {frame, memory} = Memory.place(data.memory, id, request.frame)
    {:keep_state, %{data | outbox: Outbox.put(data.outbox, id, frame), memory: memory}, deadline}
  end

  # The pool has not heard yet that the worker ended, and will not take it for one that it had.
  def handle_event(:info, {:request, _port, _request}, _state, _data), do: :keep_state_and_data

  def handle_event(:info, {:restart, reason}, _state, data), do: ended(reason, data, 0)

  # Of a request

  def handle_event({:timeout, {:request, id}}, :deadline, :ready, data), do: withdraw(id, data)

  def handle_event({:timeout, {:request, _id}}, :grace, :ready, data), do: ended(:overdue, data)

  def handle_event(:info, {{:gone, id}, _monitor, _, _, _}, _state, %{requests: requests} = data)
      when is_map_key(requests, id) and :erlang.map_get(id, requests) != :withdrawn,
      do: withdraw(id, data)

  def handle_event(:info, {{:gone, _id}, _monitor, _, _, _}, _state, _data),
    do: :keep_state_and_data

  # From the writer

  def handle_event(:info, {writer, :written}, _state, %{outbox: %{writer: writer}} = data),
    do: {:keep_state, %{data | outbox: Outbox.written(data.outbox)}}

  def handle_event(:info, {writer, :full}, _state, %{outbox: %{writer: writer}} = data) do
    {id, outbox} = Outbox.full(data.outbox)
    data = %{data | outbox: outbox}
    # It was withdrawn in the moment that the writer had it.
    if data.requests[id] == :withdrawn, do: withdraw(id, data), else: {:keep_state, data}
  end

  def handle_event(:info, {:EXIT, writer, reason}, _state, %{outbox: %{writer: writer}} = data),
    do: ended({:port, reason}, data)

  # From Python

  def handle_event(:info, {port, {:data, frame}}, state, %{port: port} = data),
    do: frame |> Protocol.decode(&Memory.read(data.memory, &1, &2)) |> received(state, data)

  # Ended by a signal, it has nothing to say about what it lacks.
  def handle_event(:info, {port, {:exit_status, status}}, :starting, %{port: port} = data)
      when status < 128 do
    {:error, %WorkerError{reason: reason}} = Python.diagnose(data.config, status)
    ended(reason, data)
  end

  def handle_event(:info, {port, {:exit_status, status}}, _state, %{port: port} = data),
    do: ended({:exited, status}, data)

  # Python closed its end; the exit status is usually a moment away and says more.
  def handle_event(:info, {:EXIT, port, reason}, _state, %{port: port}),
    do: {:keep_state_and_data, {{:timeout, :closed}, 200, {:port, reason}}}

  # From a port that was replaced, or its writer.
  def handle_event(:info, {port, _message}, _state, _data) when is_port(port),
    do: :keep_state_and_data

  def handle_event(:info, {:EXIT, _port_or_pid, _reason}, _state, _data),
    do: :keep_state_and_data

  def handle_event(:info, {_writer, news}, _state, _data) when news in [:written, :full],
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

  def handle_event({:timeout, :closed}, reason, _state, data), do: ended(reason, data)
  def handle_event({:timeout, :ping}, :ping, :ready, data), do: ping(data)

  def handle_event(type, message, _state, data) do
    Log.stray(__MODULE__, data.config.name, {type, message})
    :keep_state_and_data
  end

  defp open(data) do
    case Python.open(data.config, Python.worker_args(data.config)) do
      {:ok, port, os_pid} ->
        Pool.worker(data.pool, data.index, {:starting, os_pid})
        opened = System.monotonic_time()
        data = %{data | port: port, os_pid: os_pid, outbox: Outbox.open(port), opened: opened}
        {:next_state, :starting, data, {:state_timeout, data.config.start_timeout, :not_ready}}

      {:error, %WorkerError{reason: reason}} ->
        ended(reason, data)
    end
  end

  # What was not begun is gone without a trace.
  defp withdraw(id, data) do
    with {_reply_to, monitor} <- data.requests[id], do: Process.demonitor(monitor, [:flush])

    case Outbox.withdraw(data.outbox, id) do
      {:ok, outbox} ->
        forget(id, %{data | outbox: outbox})

      :begun ->
        outbox = Outbox.put_first(data.outbox, Protocol.encode_cancel(id))
        data = put_in(data.requests[id], :withdrawn)

        {:keep_state, %{data | outbox: outbox},
         {{:timeout, {:request, id}}, data.config.grace, :grace}}
    end
  end

  defp forget(id, data) do
    Pool.done(data.pool, id)
    requests = Map.delete(data.requests, id)
    data = %{data | requests: requests, memory: Memory.release(data.memory, id)}
    {:keep_state, data, {{:timeout, {:request, id}}, :cancel}}
  end

  defp received({:log, record}, _state, data),
    do: {:keep_state, %{data | log: Log.write(data.log, record)}}

  defp received({:ready, ready}, :starting, data) do
    with nil <- version_mismatch(ready),
         nil <- too_large(ready, data.config),
         {:ok, memory} <- share(ready, data.config) do
      duration = System.monotonic_time() - data.opened
      Pool.worker(data.pool, data.index, {:ready, data.port, ready})

      up = %{
        duration: duration,
        os_pid: data.os_pid,
        versions: Map.take(ready, [:package, :python, :torch, :tinker])
      }

      report(fn -> Telemetry.worker_up(data.config, data.index, up) end)
      outbox = if memory == Memory.none(), do: data.outbox, else: Outbox.share(data.outbox, ready)
      data = %{data | memory: memory, outbox: outbox, ping: nil, missed_pings: 0}
      {:next_state, :ready, data, next_ping(data)}
    else
      # Unless it was killed: its exit status would be a moment away.
      {:unshared, refusal} ->
        {:keep_state, data, {{:timeout, :closed}, 200, {:not_started, refusal}}}

      refusal ->
        ended({:not_started, refusal}, data)
    end
  end

  defp received({:result, id, %{rss: _} = pong}, :ready, data) do
    if id == data.ping or id == Outbox.probe() do
      Pool.worker(data.pool, data.index, {:alive, pong})
      ping = if id != data.ping, do: data.ping
      {:keep_state, %{data | ping: ping, missed_pings: 0}}
    else
      ended({:protocol, "the worker answered the ping #{id}, which nobody sent"}, data)
    end
  end

  defp received({:result, id, result}, :ready, data), do: answer(id, {:ok, result}, data)

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

  defp answer(id, answer, data) do
    case data.requests do
      %{^id => {reply_to, monitor}} ->
        Process.demonitor(monitor, [:flush])
        result = forget(id, %{data | failures: 0})
        Pool.answer(reply_to, answer)
        # As at a ping, without waiting for one.
        if Memory.has?(data.memory, id), do: :erlang.garbage_collect()
        result

      %{^id => :withdrawn} ->
        forget(id, %{data | failures: 0})

      _unknown ->
        ended({:protocol, "the worker answered #{id}, which nobody asked"}, data)
    end
  end

  defp ping(%{ping: nil} = data) do
    id = System.unique_integer([:positive])
    outbox = Outbox.put_first(data.outbox, Protocol.encode_ping(id))
    # Nothing here makes garbage fast enough to let go of the frames that passed.
    :erlang.garbage_collect()
    memory = Memory.trim(data.memory)
    {:keep_state, %{data | ping: id, outbox: outbox, memory: memory}, next_ping(data)}
  end

  defp ping(%{requests: requests, missed_pings: missed} = data) do
    limit = if requests == %{}, do: @missed_pings, else: @missed_pings_busy

    if missed + 1 >= limit,
      do: ended(:unresponsive, data),
      else: {:keep_state, %{data | missed_pings: missed + 1}, next_ping(data)}
  end

  defp next_ping(data), do: {{:timeout, :ping}, data.config.ping_interval, :ping}

  defp ended(reason, data), do: ended(reason, data, backoff(data.config.backoff, data.failures))

  defp ended(reason, %{index: index, os_pid: os_pid} = data, delay) do
    begun = for {id, _} <- data.requests, Outbox.begun?(data.outbox, id), do: id
    Pool.worker(data.pool, index, {:down, reason, begun})
    if data.port, do: close(data)

    report(fn ->
      Telemetry.worker_down(data.config, index, reason, os_pid, delay)
      Log.worker_down(data.config.name, index, reason, os_pid, delay)
    end)

    for {_id, {_reply_to, monitor}} <- data.requests, do: Process.demonitor(monitor, [:flush])
    timers = [:ping, :closed | for({id, _} <- data.requests, do: {:request, id})]
    timers = for name <- timers, do: {{:timeout, name}, :cancel}

    data = %{
      data
      | port: nil,
        os_pid: nil,
        outbox: nil,
        memory: Memory.none(),
        requests: %{},
        ping: nil,
        failures: data.failures + 1
    }

    {:next_state, :down, data, [{{:timeout, :backoff}, delay, :open} | timers]}
  end

  defp close(data) do
    Outbox.close(data.outbox)
    Memory.close(data.memory)
    Port.close(data.port)
  rescue
    ArgumentError -> true
  end

  # Handlers are the user's, and may be slow.
  defp report(fun), do: spawn(fun)

  defp backoff({first, longest}, failures),
    do: min(longest, first * Integer.pow(2, min(failures, 30)))

  defp version_mismatch(%{protocol: version}) do
    ours = Protocol.version()

    {older, what} =
      if version < ours,
        do: {"Python package tinker-custom-loss", "pip install --upgrade tinker-custom-loss"},
        else: {"Elixir package tinkex_custom_loss", "mix deps.update tinkex_custom_loss"}

    if version != ours do
      "the worker speaks version #{version} of the protocol, this side version #{ours}: " <>
        "the #{older} is older; run: #{what}"
    end
  end

  # It would be started anew at every ping. What it computes with comes on top.
  defp too_large(%{rss: rss}, %{max_rss: max}) when is_integer(rss) and 3 * rss > 2 * max do
    "a worker starts with #{rss} bytes in memory, and :max_rss is #{max}: " <>
      "raise that to #{div(3 * rss, 2)} at least, or load less"
  end

  defp too_large(_ready, _config), do: nil

  defp share(_ready, %{shared_memory: false}), do: {:ok, Memory.none()}

  defp share(ready, %{shared_memory: wanted}) do
    case Memory.open(ready) do
      {:error, why} when wanted == true ->
        {:unshared,
         "there is no memory to share with the worker, since #{why}; with shared_memory: :auto, " <>
           "the pipe serves instead"}

      {:error, _why} ->
        {:ok, Memory.none()}

      opened ->
        opened
    end
  end
end
