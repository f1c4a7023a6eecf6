defmodule Tinkex.CustomLoss.Pool do
  @moduledoc false
  # Who may send to which worker, and who waits. A request is
  #
  #     ──▶ waiting ────room at a worker────▶ there ──answered, or withdrawn──▶ done
  #                                            │
  #                  its worker ended ┌────────┴────────┐ ... perhaps by its fault
  #            by no fault of its own ▼                 ▼
  #                               returned          retrying ──▶ given up, when it ends an idle
  #                                   │                 │        worker, too
  #         room, before what waits   ▼                 ▼   an idle worker, or room where none will be
  #                                 there             there
  #
  # where it is withdrawn at its deadline, or when its caller ends: from here, or by the worker that
  # has it. What waits, waits in order for whichever worker has room.
  #
  # What is retried was with others on a worker that ended, any of which may be the cause, and has an
  # idle worker for itself: the replacement, or one of the others, which newcomers may still join if
  # nobody else serves them. So healthy workers never wait for it. Whoever ends a worker alone is the
  # cause, and is given up. Where a replacement does not start, no worker need ever be idle: then it
  # joins one that is busy, since to keep that free of newcomers would stop them.
  #
  # What Python never read, and what was with a worker that was killed from outside or for another's
  # deadline, is not the cause, and is served where there is room.
  #
  # What the pool knows of its workers, and which of them is given a request, is in Slots; who waits, in
  # Line. Whatever changes, `settled/1` does what follows from it.

  use GenServer

  alias Tinkex.CustomLoss.{OverloadedError, WorkerError}
  alias Tinkex.CustomLoss.Pool.{Handle, Line, Log, Reaper, Slots, Worker}

  @typedoc """
  `reply_to` is the alias of who waits, and `frame` a list of binaries, none of them a small part of
  many, so that a message with it is short.
  """
  @type request :: %{
          id: pos_integer(),
          caller: pid(),
          reply_to: reference(),
          frame: [binary()],
          deadline: integer() | :infinity
        }

  # Bytes of a request.
  @large 1_048_576

  def start_link({supervisor, config}), do: GenServer.start_link(__MODULE__, {supervisor, config})

  @doc """
  Asks for what comes as messages `{reply_to, message}`, the last of which is an answer.

    * `{:queued, length}` - it waits
    * `:granted` - it waited, and a worker has it
    * `{:retry, reason}` - that worker ended
    * `{:answer, {:ok, result}}`, `{:answer, {:error, error}}` - what Python said, or an exception
  """
  @spec request(pid(), request()) :: :ok
  def request(pool, request), do: GenServer.cast(pool, {:request, request})

  @doc "Answers the request of `reply_to`."
  def answer(reply_to, answer), do: tell(reply_to, {:answer, answer})

  def tell(reply_to, message), do: send(reply_to, {reply_to, message})

  @doc "Milliseconds until a deadline in `System.monotonic_time(:millisecond)`, at least 0."
  @spec remaining(integer() | :infinity) :: timeout()
  def remaining(:infinity), do: :infinity
  def remaining(deadline), do: max(0, deadline - System.monotonic_time(:millisecond))

  @doc "The calling worker no longer has the request `id`."
  def done(pool, id), do: GenServer.cast(pool, {:done, id})

  @doc """
  News of the calling worker: `{:starting, os_pid}`, `{:ready, port, ready}`, `{:alive, pong}`,
  `{:down, reason, ids of the requests that Python may have seen}`.
  """
  def worker(pool, index, news), do: GenServer.cast(pool, {:worker, index, self(), news})

  @doc """
  Asks the pool for something other than a computation: `:info`, `:await_ready`, `:drain` (no more
  requests, and `:ok` when there are none), `:reload` (`:ok` when all workers were started anew).
  """
  @spec ask(pid(), atom(), timeout()) :: :ok | {:ok, map()} | {:error, Exception.t()} | :timeout
  def ask(pool, what, timeout) do
    GenServer.call(pool, what, timeout)
  catch
    :exit, {:timeout, _call} -> :timeout
    :exit, {reason, _call} -> {:error, %WorkerError{reason: {:stopped, reason}}}
  end

  @impl true
  def init({supervisor, config}) do
    # The shell may end, which is no reason to.
    Process.flag(:trap_exit, true)
    Process.put(:"$process_label", {__MODULE__, config.name})

    state = %{
      handle: Handle.publish(%Handle{supervisor: supervisor, pool: self(), config: config}),
      config: config,
      reaper: Reaper.open(),
      slots: Slots.new(config),
      # id => a request that a worker has, and the index of its slot
      requests: %{},
      line: %Line{},
      # Who waits for the first worker; for all workers to be new; for the last request, if there shall
      # be no more.
      awaiting: [],
      reloading: [],
      draining: nil,
      started: System.monotonic_time(:millisecond)
    }

    {:ok, state}
  end

  @impl true
  def handle_call(:info, _from, state), do: {:reply, {:ok, describe(state)}, state}

  def handle_call(:await_ready, from, state) do
    cond do
      state.handle.terms -> {:reply, :ok, state}
      error = hopeless(state) -> {:reply, {:error, error}, state}
      true -> {:noreply, %{state | awaiting: [from | state.awaiting]}}
    end
  end

  def handle_call(:drain, from, state),
    do: settled(%{state | draining: [from | state.draining || []]})

  def handle_call(:reload, from, state) do
    reloading = [from | state.reloading]
    settled(%{state | reloading: reloading, slots: Slots.reload(state.slots)})
  end

  def handle_call(other, _from, state), do: stray(other, state)

  @impl true
  def handle_cast({:request, %{reply_to: _} = request}, state) do
    request = Map.put(request, :losses, [])
    queued = Line.size(state.line, :waiting)
    room = if queued == 0, do: Slots.roomiest(state.slots)

    cond do
      error = hopeless(state) -> refuse(request, error, state)
      state.draining -> refuse(request, %WorkerError{reason: :draining}, state)
      room -> state |> place(request, room) |> settled()
      queued < state.config.max_queue -> state |> park(request, :waiting) |> settled()
      true -> refuse(request, overloaded(state), state)
    end
  end

  def handle_cast({:done, id}, state) do
    {:noreply, next} = state |> release(id) |> settled()

    if large?(state.requests[id]),
      do: {:noreply, next, {:continue, :collect}},
      else: {:noreply, next}
  end

  def handle_cast({:worker, index, pid, news}, state),
    do: state |> know(index, pid) |> news(index, news) |> settled()

  def handle_cast(other, state), do: stray(other, state)

  # A large request that is over would else be kept until the next ping.
  @impl true
  def handle_continue(:collect, state) do
    :erlang.garbage_collect()
    {:noreply, state}
  end

  @impl true
  def handle_info({{:gone, id}, _monitor, :process, _pid, _reason}, state),
    do: settled(%{state | line: Line.withdraw(state.line, id)})

  def handle_info({:timeout, _timer, {:deadline, id}}, state),
    do: settled(%{state | line: Line.withdraw(state.line, id)})

  def handle_info({:DOWN, _monitor, :process, pid, reason} = message, state) do
    if index = Slots.find(state.slots, pid),
      do: state |> forget(index, {:stopped, reason}) |> settled(),
      else: stray(message, state)
  end

  def handle_info({:EXIT, reaper, _reason}, %{reaper: reaper} = state) do
    reaper = Reaper.open()
    for os_pid <- Slots.os_pids(state.slots), do: Reaper.watch(reaper, os_pid)
    {:noreply, %{state | reaper: reaper}}
  end

  def handle_info(other, state), do: stray(other, state)

  defp stray(message, state) do
    Log.stray(__MODULE__, state.config.name, message)
    {:noreply, state}
  end

  defp settled(state), do: {:noreply, state |> serve() |> renew() |> drained()}

  # Requests

  defp refuse(request, error, state) do
    answer(request.reply_to, {:error, error})
    {:noreply, state}
  end

  defp overloaded(state),
    do: %OverloadedError{in_flight: map_size(state.requests), queued: Line.size(state.line)}

  defp park(state, request, place), do: %{state | line: Line.join(state.line, place, request)}

  defp place(state, request, index) do
    %{worker: worker, port: port} = Slots.get(state.slots, index)
    Worker.request(worker, port, request)
    requests = Map.put(state.requests, request.id, {request, index})
    %{state | requests: requests, slots: Slots.take(state.slots, index, request.losses)}
  end

  defp large?(nil), do: false
  defp large?({request, _index}), do: IO.iodata_length(request.frame) >= @large

  # In order, even if a later one would find room where the first does not: it would never be its turn.
  defp serve(state) do
    room = Slots.roomiest(state.slots)
    places = [retrying: Slots.for_retry(state.slots), returned: room, waiting: room]
    served = Enum.find_value(places, &serve(&1, state))
    if served, do: serve(served), else: state
  end

  defp serve({_place, nil}, _state), do: nil

  defp serve({place, index}, state) do
    with {request, line} <- Line.take(state.line, place),
         do: place(%{state | line: line}, request, index)
  end

  defp release(state, id) do
    case Map.pop(state.requests, id) do
      {{_request, index}, requests} ->
        %{state | requests: requests, slots: Slots.release(state.slots, index)}

      # Of a worker that has ended since, by what was heard of it.
      {nil, _requests} ->
        state
    end
  end

  # A request of a worker that ended.
  defp lose(request, state, index, reason, begun) do
    state = %{state | requests: Map.delete(state.requests, request.id)}
    losses = [{index, reason} | request.losses]

    cond do
      remaining(request.deadline) == 0 or not Process.alive?(request.caller) ->
        state

      begun != :unknown and request.id not in begun ->
        park(state, request, :returned)

      Slots.get(state.slots, index).alone ->
        reasons = for {_index, reason} <- Enum.reverse(losses), do: reason
        answer(request.reply_to, {:error, %WorkerError{reason: {:lost, reasons}}})
        state

      true ->
        tell(request.reply_to, {:retry, reason})
        cleared = request.losses == [] and cleared?(reason)
        park(state, %{request | losses: losses}, if(cleared, do: :returned, else: :retrying))
    end
  end

  # Killed from outside, or for a request that is withdrawn: it was none of the others. A term that
  # kills its own process, or takes all memory, does so twice.
  defp cleared?(reason), do: reason in [{:exited, 137}, :overdue]

  # Workers

  defp know(state, index, pid) do
    known = Slots.get(state.slots, index).worker
    if pid != known, do: Process.monitor(pid)
    state = if known in [nil, pid], do: state, else: forget(state, index, :replaced)
    %{state | slots: Slots.put_worker(state.slots, index, pid)}
  end

  # The Erlang process of a worker ended, and what it knew of its requests with it.
  defp forget(state, index, reason) do
    state = news(state, index, {:down, reason, :unknown})
    %{state | slots: Slots.put_worker(state.slots, index, nil)}
  end

  defp news(state, index, {:starting, os_pid}) do
    if os_pid, do: Reaper.watch(state.reaper, os_pid)
    %{state | slots: Slots.starting(state.slots, index, os_pid)}
  end

  defp news(state, index, {:ready, port, ready}) do
    handle = Handle.publish(%{state.handle | terms: Map.new(ready.terms, &{&1.name, &1})})
    slots = Slots.ready(state.slots, index, port, ready)
    reply_to_all(%{state | handle: handle, slots: slots}, :awaiting, :ok)
  end

  defp news(state, index, {:alive, %{rss: rss}}) do
    # Of the frames that passed.
    :erlang.garbage_collect()
    %{state | slots: Slots.alive(state.slots, index, rss)}
  end

  defp news(state, index, {:down, reason, begun}) do
    if os_pid = Slots.get(state.slots, index).os_pid, do: Reaper.kill(state.reaper, os_pid)
    requests = for {_id, {request, ^index}} <- state.requests, do: request
    in_order = Enum.sort_by(requests, & &1.id)
    state = Enum.reduce(in_order, state, &lose(&1, &2, index, reason, begun))
    give_up(%{state | slots: Slots.down(state.slots, index, reason)})
  end

  defp give_up(state) do
    if error = hopeless(state) do
      {requests, line} = Line.empty(state.line)
      for request <- requests, do: answer(request.reply_to, {:error, error})
      reply_to_all(%{state | line: line}, :awaiting, {:error, error})
    else
      state
    end
  end

  defp hopeless(state) do
    if reason = Slots.hopeless(state.slots), do: %WorkerError{reason: reason}
  end

  # Who manages the pool

  defp renew(state) do
    case Slots.renew(state.slots) do
      {:restart, worker, why, slots} ->
        Worker.restart(worker, why)
        %{state | slots: slots}

      :wait ->
        state

      {:done, failure} ->
        answer = if failure, do: {:error, %WorkerError{reason: failure}}, else: :ok
        reply_to_all(state, :reloading, answer)
    end
  end

  defp drained(%{draining: [_ | _], requests: requests} = state) when requests == %{} do
    if Line.size(state.line) == 0, do: reply_to_all(state, :draining, :ok), else: state
  end

  defp drained(state), do: state

  defp reply_to_all(state, who, answer) do
    for from <- Map.fetch!(state, who), do: GenServer.reply(from, answer)
    Map.put(state, who, [])
  end

  defp describe(state) do
    %{
      workers: Slots.describe(state.slots),
      in_flight: map_size(state.requests),
      queued: Line.size(state.line),
      uptime_ms: System.monotonic_time(:millisecond) - state.started,
      max_queue: state.config.max_queue,
      max_in_flight: state.config.max_in_flight
    }
  end
end
