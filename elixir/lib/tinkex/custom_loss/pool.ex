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
  # A worker that is to be started anew is given no more requests, and ended once it has none; one worker
  # at a time is. See Slot for its states.

  use GenServer

  alias Tinkex.CustomLoss.{OverloadedError, WorkerError}
  alias Tinkex.CustomLoss.Pool.{Line, Log, Reaper, Slot, Worker}

  @type handle :: %{
          supervisor: pid(),
          pool: pid(),
          config: map(),
          terms: %{String.t() => map()} | nil
        }

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

  def start_link({supervisor, config}), do: GenServer.start_link(__MODULE__, {supervisor, config})

  @doc """
  The pool of a supervisor on this node; nil if there is none.

  `terms` is nil until the first worker was ready.
  """
  @spec whereis(pid()) :: handle() | nil
  def whereis(supervisor), do: :persistent_term.get(key(supervisor), nil)

  defp key(supervisor), do: {__MODULE__, supervisor}

  @doc "Forgets the pool of a supervisor, the calling process, once that has ended in any way."
  def forget_with(supervisor) do
    spawn(fn ->
      monitor = Process.monitor(supervisor)
      receive do: ({:DOWN, ^monitor, _, _, _} -> :persistent_term.erase(key(supervisor)))
    end)
  end

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
      handle: %{supervisor: supervisor, pool: self(), config: config, terms: nil},
      config: config,
      reaper: Reaper.open(),
      slots: Map.new(1..config.workers, &{&1, Slot.new()}),
      # pid of a worker => index of its slot
      workers: %{},
      # id => a request that a worker has, and the index of its slot
      requests: %{},
      line: %Line{},
      # Who waits for the first worker; for the last request, if there shall be no more; and for ...
      awaiting: [],
      draining: nil,
      reloading: [],
      # ... the slots that are to be started anew, and why. The first one is closed.
      renewals: [],
      started: System.monotonic_time(:millisecond)
    }

    {:ok, publish(state)}
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
    do: {:noreply, settle(%{state | draining: [from | state.draining || []]})}

  # Of those that were to be started anew, only the first one may have loaded what was edited since.
  def handle_call(:reload, from, state) do
    begun = Enum.take(state.renewals, 1)
    renewals = begun ++ for index <- Map.keys(state.slots), do: {index, :reloaded}
    {:noreply, settle(%{state | reloading: [from | state.reloading], renewals: renewals})}
  end

  def handle_call(other, _from, state), do: stray(other, state)

  @impl true
  def handle_cast({:request, %{reply_to: reply_to} = request}, state) do
    cond do
      error = hopeless(state) ->
        refuse(reply_to, error, state)

      state.draining ->
        refuse(reply_to, %WorkerError{reason: :draining}, state)

      full?(state) and not room?(state) ->
        refuse(reply_to, overloaded(state), state)

      true ->
        {:noreply, request |> Map.put(:losses, []) |> admit(state) |> settle()}
    end
  end

  def handle_cast({:done, id}, state), do: {:noreply, state |> release(id) |> settle()}

  def handle_cast({:worker, index, pid, news}, state),
    do: {:noreply, state |> know(index, pid) |> news(index, news) |> settle()}

  def handle_cast(other, state), do: stray(other, state)

  @impl true
  def handle_info({{:gone, id}, _monitor, :process, _pid, _reason}, state),
    do: {:noreply, settle(%{state | line: Line.withdraw(state.line, id)})}

  def handle_info({:timeout, _timer, {:deadline, id}}, state),
    do: {:noreply, settle(%{state | line: Line.withdraw(state.line, id)})}

  def handle_info({:DOWN, _monitor, :process, pid, reason}, %{workers: workers} = state)
      when is_map_key(workers, pid),
      do: {:noreply, state |> forget(pid, {:stopped, reason}) |> settle()}

  def handle_info({:EXIT, reaper, _reason}, %{reaper: reaper} = state) do
    reaper = Reaper.open()

    for {_index, %{os_pid: os_pid}} when os_pid != nil <- state.slots,
        do: Reaper.watch(reaper, os_pid)

    {:noreply, %{state | reaper: reaper}}
  end

  def handle_info(other, state), do: stray(other, state)

  defp stray(message, state) do
    Log.stray(__MODULE__, state.config.name, message)
    {:noreply, state}
  end

  defp refuse(reply_to, error, state) do
    answer(reply_to, {:error, error})
    {:noreply, state}
  end

  # What follows from whatever has changed.
  defp settle(state), do: state |> serve() |> renew() |> drained()

  # Requests

  defp admit(request, state) do
    if room?(state),
      do: place(request, roomiest(state), state),
      else: park(request, :waiting, state)
  end

  defp park(request, place, state),
    do: %{state | line: Line.join(state.line, place, request)}

  # In order, even if a later one would find room where the first does not: it would never be its turn.
  defp serve(state) do
    room = roomiest(state)

    served =
      serve(state, :retrying, idle(state) || (stranded?(state) && room) || nil) ||
        serve(state, :returned, room) || serve(state, :waiting, room)

    if served, do: serve(served), else: state
  end

  defp serve(_state, _place, nil), do: nil

  defp serve(state, place, index) do
    with {request, line} <- Line.take(state.line, place),
         do: place(request, index, %{state | line: line})
  end

  defp place(request, index, state) do
    slot = Map.fetch!(state.slots, index)
    Worker.request(slot.worker, slot.port, request)
    state = put_in(state.slots[index], Slot.take(slot, index, request.losses))
    put_in(state.requests[request.id], {request, index})
  end

  # A worker did not start again, and no other is to be expected that has nothing to do.
  defp stranded?(%{slots: slots}) do
    Enum.any?(slots, fn {_, slot} -> slot.failed end) and
      not Enum.any?(slots, fn {_, slot} -> Slot.coming?(slot) end)
  end

  defp idle(state), do: Enum.find_value(state.slots, fn {i, slot} -> Slot.open?(slot, 1) && i end)

  defp roomiest(state) do
    for {index, slot} <- state.slots, Slot.open?(slot, state.config.max_in_flight) do
      {slot.alone != nil, slot.load, index}
    end
    |> Enum.min(fn -> {nil, nil, nil} end)
    |> elem(2)
  end

  defp release(state, id) do
    case Map.pop(state.requests, id) do
      {{_request, index}, requests} ->
        update_in(%{state | requests: requests}, [:slots, index], &Slot.release/1)

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
        park(request, :returned, state)

      state.slots[index].alone ->
        reasons = for {_index, reason} <- Enum.reverse(losses), do: reason
        answer(request.reply_to, {:error, %WorkerError{reason: {:lost, reasons}}})
        state

      true ->
        tell(request.reply_to, {:retry, reason})
        cleared = request.losses == [] and cleared?(reason)
        place = if cleared, do: :returned, else: :retrying
        park(%{request | losses: losses}, place, state)
    end
  end

  # Killed from outside, or for a request that is withdrawn: it was none of the others. A term that
  # kills its own process, or takes all memory, does so twice.
  defp cleared?(reason), do: reason in [{:exited, 137}, :overdue]

  defp room?(state), do: Line.size(state.line, :waiting) == 0 and roomiest(state) != nil
  defp full?(state), do: Line.size(state.line, :waiting) >= state.config.max_queue

  defp overloaded(state) do
    %OverloadedError{in_flight: map_size(state.requests), queued: Line.size(state.line)}
  end

  # Workers

  defp know(%{workers: workers} = state, _index, pid) when is_map_key(workers, pid), do: state

  defp know(state, index, pid) do
    Process.monitor(pid)
    state = forget(state, state.slots[index].worker, :replaced)
    put_in(%{state | workers: Map.put(state.workers, pid, index)}.slots[index].worker, pid)
  end

  # The Erlang process of a worker ended, and what it knew of its requests with it.
  defp forget(state, nil, _reason), do: state

  defp forget(state, pid, reason) do
    {index, workers} = Map.pop!(state.workers, pid)
    state = news(%{state | workers: workers}, index, {:down, reason, :unknown})
    put_in(state.slots[index].worker, nil)
  end

  defp news(state, index, {:starting, os_pid}) do
    if os_pid, do: Reaper.watch(state.reaper, os_pid)
    update_in(state.slots[index], &Slot.starting(&1, os_pid))
  end

  defp news(state, index, {:ready, port, ready}) do
    state
    |> update_in([:slots, index], &Slot.ready(&1, port, ready))
    |> put_in([:handle, :terms], Map.new(ready.terms, &{&1.name, &1}))
    |> publish()
    |> renewed(index, :ok)
  end

  defp news(state, index, {:alive, %{rss: rss}}) do
    # Of the frames that passed.
    :erlang.garbage_collect()
    state = put_in(state.slots[index].rss, rss)

    if rss > state.config.max_rss and not List.keymember?(state.renewals, index, 0),
      do: %{state | renewals: state.renewals ++ [{index, {:max_rss, rss}}]},
      else: state
  end

  defp news(state, index, {:down, reason, begun}) do
    if os_pid = state.slots[index].os_pid, do: Reaper.kill(state.reaper, os_pid)

    requests = for {_id, {request, ^index}} <- state.requests, do: request

    requests
    |> Enum.sort_by(& &1.id)
    |> Enum.reduce(state, &lose(&1, &2, index, reason, begun))
    |> update_in([:slots, index], &Slot.down(&1, reason))
    |> renewed(index, {:down, reason})
    |> give_up()
  end

  # A changed handle costs every process of the node a scan, and most workers have the same terms.
  defp publish(%{handle: handle} = state) do
    if whereis(handle.supervisor) != handle,
      do: :persistent_term.put(key(handle.supervisor), handle)

    if handle.terms, do: reply_to_all(state, :awaiting, :ok), else: state
  end

  defp reply_to_all(state, who, answer) do
    for from <- Map.fetch!(state, who), do: GenServer.reply(from, answer)
    Map.put(state, who, [])
  end

  # When every worker failed to start, waiting for one is no use.
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
    reasons = for {_index, slot} <- state.slots, do: {slot.state, slot.reason}

    if Enum.all?(reasons, &match?({:down, {:not_started, _sentence}}, &1)) do
      {:down, reason} = hd(reasons)
      %WorkerError{reason: reason}
    end
  end

  defp drained(%{draining: [_ | _], requests: requests} = state) when requests == %{} do
    if Line.size(state.line) == 0, do: reply_to_all(state, :draining, :ok), else: state
  end

  defp drained(state), do: state

  # Rolling restarts: of the first slot in `renewals`, one step further

  defp renew(%{renewals: [{index, reason} | _]} = state) do
    case state.slots[index] do
      %{renewal: nil} ->
        renew(put_in(state.slots[index].renewal, :closed))

      %{renewal: :closed, load: 0, worker: worker} when worker != nil ->
        Worker.restart(worker, reason)
        put_in(state.slots[index].renewal, :ending)

      _in_time ->
        state
    end
  end

  defp renew(state), do: reply_to_all(state, :reloading, :ok)

  defp renewed(%{renewals: [{index, why} | rest]} = state, index, news) do
    case {state.slots[index].renewal, news} do
      # Twice, if it had ended by itself when it was first told to.
      {stage, {:down, ^why}} when stage in [:ending, :starting] ->
        put_in(state.slots[index].renewal, :starting)

      {:starting, :ok} ->
        put_in(%{state | renewals: rest}.slots[index].renewal, nil)

      # With what it would load now, no other should be ended for it.
      {:starting, {:down, reason}} ->
        state = put_in(%{state | renewals: []}.slots[index].renewal, nil)
        reply_to_all(state, :reloading, {:error, %WorkerError{reason: reason}})

      {_closed, {:down, _other}} ->
        put_in(state.slots[index].renewal, :closed)

      {_closed, :ok} ->
        state
    end
  end

  defp renewed(state, _index, _news), do: state

  defp describe(state) do
    %{
      workers: for({index, slot} <- Enum.sort(state.slots), do: Slot.describe(slot, index)),
      in_flight: map_size(state.requests),
      queued: Line.size(state.line),
      uptime_ms: System.monotonic_time(:millisecond) - state.started,
      max_queue: state.config.max_queue,
      max_in_flight: state.config.max_in_flight
    }
  end
end
