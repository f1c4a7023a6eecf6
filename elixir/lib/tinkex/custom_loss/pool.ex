defmodule Tinkex.CustomLoss.Pool do
  @moduledoc false
  # Who may send to which worker: the least loaded one that is ready and has room, else a queue.
  #
  # A request is known here from the moment it asks for room until Python has answered it, which may
  # be long after its caller gave up. Its bytes never come near this process.

  use GenServer

  alias Tinkex.CustomLoss.{OverloadedError, Telemetry, TimeoutError, WorkerError}
  alias Tinkex.CustomLoss.Pool.Worker

  @type handle :: %{
          supervisor: pid(),
          pool: pid(),
          config: map(),
          terms: %{String.t() => map()} | nil
        }

  def start_link({supervisor, config}), do: GenServer.start_link(__MODULE__, {supervisor, config})

  @doc """
  The pool of a supervisor on this node; nil if there is none.

  `terms` is nil until the first worker was ready.
  """
  @spec whereis(pid()) :: handle() | nil
  def whereis(supervisor), do: :persistent_term.get(key(supervisor), nil)

  defp key(supervisor), do: {__MODULE__, supervisor}

  @doc """
  Room at a worker for the request `id`, waited for until `deadline`.

  The request is withdrawn when its caller dies. A `:retry` was on a worker that ended. It goes
  before all others, is not refused, and has the next worker for itself: if that ends, too, nobody
  else is the cause, and nobody else is hit.
  """
  @spec checkout(pid(), integer(), :first | :retry, integer() | :infinity) ::
          {:ok, worker :: pid(), port()}
          | {:error, OverloadedError.t() | WorkerError.t()}
          | :timeout
  def checkout(pool, id, kind, deadline) do
    GenServer.call(pool, {:checkout, id, kind}, remaining(deadline))
  catch
    :exit, {:timeout, _call} ->
      abandon(pool, id)
      :timeout

    :exit, {reason, _call} ->
      {:error, %WorkerError{reason: {:stopped, reason}}}
  end

  @doc "Milliseconds until a deadline in `System.monotonic_time(:millisecond)`, at least 0."
  @spec remaining(integer() | :infinity) :: timeout()
  def remaining(:infinity), do: :infinity
  def remaining(deadline), do: max(0, deadline - System.monotonic_time(:millisecond))

  @doc "The caller no longer waits for the answer to `id`."
  def abandon(pool, id), do: GenServer.cast(pool, {:abandon, id})

  @doc "A worker no longer has the request `id`."
  def done(pool, id), do: GenServer.cast(pool, {:done, id})

  @doc """
  News of the calling worker: `{:starting, os_pid}`, `{:ready, port, ready}`, `{:alive, pong}`,
  `{:down, reason, delay}`.
  """
  def worker(pool, index, news), do: GenServer.cast(pool, {:worker, index, self(), news})

  @doc "Waits for the first worker that is ready, or the reason why none can be."
  @spec await_ready(pid(), timeout()) :: :ok | {:error, Exception.t()}
  def await_ready(pool, timeout) do
    GenServer.call(pool, :await_ready, timeout)
  catch
    :exit, {:timeout, _call} -> {:error, %TimeoutError{timeout: timeout, stage: :queued}}
    :exit, {reason, _call} -> {:error, %WorkerError{reason: {:stopped, reason}}}
  end

  @spec info(pid(), timeout()) :: {:ok, map()} | {:error, Exception.t()}
  def info(pool, timeout) do
    {:ok, GenServer.call(pool, :info, timeout)}
  catch
    :exit, {reason, _call} -> {:error, %WorkerError{reason: {:stopped, reason}}}
  end

  @impl true
  def init({supervisor, config}) do
    # To take the handle away in the end.
    Process.flag(:trap_exit, true)
    handle = %{supervisor: supervisor, pool: self(), config: config, terms: nil}
    :persistent_term.put(key(supervisor), handle)

    state = %{
      supervisor: supervisor,
      handle: handle,
      config: config,
      slots: Map.new(1..config.workers, &{&1, Map.merge(%{worker: nil, starts: 0}, down(nil))}),
      # id => {monitor of the caller, kind, from | index of the slot}
      requests: %{},
      callers: %{},
      workers: %{},
      queue: :queue.new(),
      awaiting: [],
      started: now()
    }

    {:ok, state}
  end

  # What a slot is without a Python process, and why.
  defp down(reason) do
    %{
      state: :down,
      reason: reason,
      since: now(),
      load: 0,
      alone: false,
      port: nil,
      os_pid: nil,
      ready: nil,
      alive: nil
    }
  end

  defp now, do: System.monotonic_time(:millisecond)

  @impl true
  def handle_call({:checkout, id, kind}, from, state) do
    cond do
      error = hopeless(state) ->
        {:reply, {:error, error}, state}

      kind == :first and full?(state) and not room?(state) ->
        {:reply, {:error, overloaded(state)}, state}

      true ->
        {:noreply, state |> admit(id, kind, from) |> enqueue(id, kind)}
    end
  end

  def handle_call(:await_ready, from, state) do
    cond do
      state.handle.terms -> {:reply, :ok, state}
      error = hopeless(state) -> {:reply, {:error, error}, state}
      true -> {:noreply, %{state | awaiting: [from | state.awaiting]}}
    end
  end

  def handle_call(:info, _from, state), do: {:reply, describe(state), state}

  @impl true
  def handle_cast({:done, id}, state), do: {:noreply, state |> release(id) |> serve_queue()}
  def handle_cast({:abandon, id}, state), do: {:noreply, withdraw(state, id)}

  def handle_cast({:worker, index, pid, news}, state),
    do: {:noreply, state |> know(index, pid) |> news(index, news)}

  @impl true
  def handle_info({:DOWN, monitor, :process, pid, reason}, state) do
    case state do
      %{callers: %{^monitor => id}} ->
        {:noreply, withdraw(state, id)}

      %{workers: %{^pid => index}} ->
        {:noreply, forget(state, index, pid, {:stopped, reason})}

      # A worker whose successor has been heard of.
      _forgotten ->
        {:noreply, state}
    end
  end

  def handle_info({:EXIT, _pid, _reason}, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state), do: :persistent_term.erase(key(state.supervisor))

  # Requests

  defp least_loaded(state, kind) do
    limit = if kind == :retry, do: 1, else: state.config.max_in_flight

    {_load, index} =
      Enum.reduce(state.slots, {limit, nil}, fn
        {index, %{state: :ready, alone: false, load: load}}, {least, _} when load < least ->
          {load, index}

        _full_or_not_ready, best ->
          best
      end)

    index
  end

  defp admit(state, id, kind, {caller, _tag} = from) do
    monitor = Process.monitor(caller)

    %{
      state
      | requests: Map.put(state.requests, id, {monitor, kind, from}),
        callers: Map.put(state.callers, monitor, id)
    }
  end

  defp grant(state, id, index) do
    {monitor, kind, from} = Map.fetch!(state.requests, id)
    slot = Map.fetch!(state.slots, index)
    GenServer.reply(from, {:ok, slot.worker, slot.port})

    %{
      state
      | requests: Map.put(state.requests, id, {monitor, kind, index}),
        slots: Map.put(state.slots, index, %{slot | load: slot.load + 1, alone: kind == :retry})
    }
  end

  defp enqueue(state, id, kind) do
    queue = if kind == :retry, do: :queue.in_r(id, state.queue), else: :queue.in(id, state.queue)
    state = serve_queue(%{state | queue: queue})

    if match?(%{^id => {_monitor, _kind, from}} when not is_integer(from), state.requests),
      do: Telemetry.queued(state.config, :queue.len(state.queue))

    state
  end

  # In order, even if a later one would find room where the first does not: it would never be its
  # turn.
  defp serve_queue(state) do
    with {:value, id} <- :queue.peek(state.queue),
         {_monitor, kind, _from} = Map.fetch!(state.requests, id),
         index when index != nil <- least_loaded(state, kind) do
      %{state | queue: :queue.drop(state.queue)} |> grant(id, index) |> serve_queue()
    else
      _empty_or_no_room -> state
    end
  end

  # Its worker tells when it is over, so that room is given only when there is some.
  defp withdraw(state, id) do
    case state.requests do
      %{^id => {_monitor, _kind, index}} when is_integer(index) ->
        Worker.abandon(state.slots[index].worker, id)
        state

      %{^id => _queued} ->
        serve_queue(%{release(state, id) | queue: :queue.delete(id, state.queue)})

      _answered ->
        state
    end
  end

  defp release(state, id) do
    case Map.pop(state.requests, id) do
      {nil, _requests} ->
        state

      {{monitor, _kind, where}, requests} ->
        Process.demonitor(monitor, [:flush])
        state = %{state | requests: requests, callers: Map.delete(state.callers, monitor)}

        if is_integer(where),
          do: update_in(state.slots[where], &%{&1 | load: &1.load - 1, alone: false}),
          else: state
    end
  end

  defp room?(state), do: :queue.is_empty(state.queue) and least_loaded(state, :first) != nil
  defp full?(state), do: :queue.len(state.queue) >= state.config.max_queue

  defp overloaded(state) do
    queued = :queue.len(state.queue)
    %OverloadedError{in_flight: map_size(state.requests) - queued, queued: queued}
  end

  # Workers

  defp know(%{workers: workers} = state, _index, pid) when is_map_key(workers, pid), do: state

  defp know(state, index, pid) do
    Process.monitor(pid)
    state = forget(state, index, state.slots[index].worker, :replaced)
    state = %{state | workers: Map.put(state.workers, pid, index)}
    put_in(state.slots[index].worker, pid)
  end

  defp forget(state, _index, nil, _reason), do: state

  defp forget(state, index, pid, reason) do
    state = %{state | workers: Map.delete(state.workers, pid)}
    news(put_in(state.slots[index].worker, nil), index, {:down, reason, 0})
  end

  defp news(state, index, {:starting, os_pid}) do
    change(state, index, %{state: :starting, os_pid: os_pid, since: now()})
  end

  defp news(state, index, {:ready, port, ready}) do
    state
    |> change(index, %{state: :ready, port: port, ready: ready, since: now()})
    |> update_in([:slots, index, :starts], &(&1 + 1))
    |> publish(ready.terms)
    |> serve_queue()
  end

  defp news(state, index, {:alive, pong}), do: change(state, index, %{alive: pong})

  defp news(state, index, {:down, reason, _delay}) do
    state =
      for {id, {_monitor, _kind, ^index}} <- state.requests, reduce: state do
        state -> release(state, id)
      end

    state |> change(index, down(reason)) |> give_up()
  end

  defp change(state, index, changes), do: update_in(state.slots[index], &Map.merge(&1, changes))

  # All workers have the same terms, and a changed handle costs every process of the node a scan.
  defp publish(%{handle: %{terms: nil}} = state, terms) do
    handle = %{state.handle | terms: Map.new(terms, &{&1.name, &1})}
    :persistent_term.put(key(state.supervisor), handle)
    for from <- state.awaiting, do: GenServer.reply(from, :ok)
    %{state | handle: handle, awaiting: []}
  end

  defp publish(state, _terms), do: state

  # When every worker failed to start, waiting for one is no use.
  defp give_up(state) do
    if error = hopeless(state) do
      for from <- state.awaiting, do: GenServer.reply(from, {:error, error})

      :queue.fold(
        fn id, state ->
          {_monitor, _kind, from} = Map.fetch!(state.requests, id)
          GenServer.reply(from, {:error, error})
          release(state, id)
        end,
        %{state | awaiting: [], queue: :queue.new()},
        state.queue
      )
    else
      state
    end
  end

  defp hopeless(state) do
    reasons = for {_index, slot} <- state.slots, do: {slot.state, slot.reason}

    if Enum.all?(reasons, &match?({:down, {:not_started, _sentence}}, &1)) do
      {:down, reason} = hd(reasons)
      %WorkerError{reason: reason}
    end
  end

  defp describe(state) do
    queued = :queue.len(state.queue)

    workers =
      for {index, slot} <- Enum.sort(state.slots) do
        %{
          index: index,
          state: slot.state,
          os_pid: slot.os_pid,
          in_flight: slot.load,
          restarts: max(0, slot.starts - 1),
          since_ms: now() - slot.since,
          reason: slot.reason,
          versions: slot.ready && Map.take(slot.ready, [:package, :python, :torch, :tinker]),
          rss: slot.alive && slot.alive.rss
        }
      end

    %{
      workers: workers,
      in_flight: map_size(state.requests) - queued,
      queued: queued,
      uptime_ms: now() - state.started,
      max_queue: state.config.max_queue,
      max_in_flight: state.config.max_in_flight
    }
  end
end
