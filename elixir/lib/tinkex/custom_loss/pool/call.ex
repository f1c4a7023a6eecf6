defmodule Tinkex.CustomLoss.Pool.Call do
  @moduledoc false
  # One request, from the side of the process that waits for it.

  alias Tinkex.CustomLoss.{
    Pool,
    RequestError,
    Telemetry,
    TermError,
    Terms,
    TimeoutError,
    WorkerError
  }

  alias Tinkex.CustomLoss.Pool.Handle
  alias Tinkex.CustomLoss.Wire.{Frame, Protocol}

  @doc """
  The result map of a `compute` request (without `:id`), or an exception struct.

  Beside what the protocol says it has `:async`, the names of the regularizers whose functions are.
  `deadline` is that of the call, whose timeout was `timeout`.

  An `ArgumentError` is the caller's to raise.
  """
  @spec run(GenServer.server(), map(), timeout(), deadline()) ::
          {:ok, map()} | {:error, Exception.t()}
  def run(server, request, timeout, deadline) do
    with_pool(server, {:run, [request]}, timeout, deadline, fn call ->
      with {:ok, result} <- answer(call, request, &Protocol.encode_compute/1),
           do: {:ok, Map.put(result, :async, async(request.regularizers, terms(call)))}
    end)
  end

  @doc "The totals of a `totals` request, or an exception struct."
  @spec totals(GenServer.server(), map(), timeout(), deadline()) ::
          {:ok, map()} | {:error, Exception.t()}
  def totals(server, request, timeout, deadline) do
    with_pool(server, {:totals, [request]}, timeout, deadline, fn call ->
      with {:ok, result} <- answer(call, request, &Protocol.encode_totals/1),
           do: {:ok, result.totals}
    end)
  end

  defp answer(call, request, encoder) do
    with :ok <- check(call, request),
         {:ok, frame} <- encode(call, request, encoder),
         {:ok, result} <- request(call, frame, :again) do
      {:ok, result}
    else
      # Until the first worker was ready, only Python could tell; the sentence is the same.
      {:error, %RequestError{} = error} ->
        with :ok <- check(call, request), do: {:error, error}

      error ->
        error
    end
  end

  @doc "The descriptors of the terms, by name."
  @spec terms(GenServer.server(), timeout(), deadline()) ::
          {:ok, [map()]} | {:error, Exception.t()}
  def terms(server, timeout, deadline) do
    with_pool(server, {:terms, []}, timeout, deadline, fn call ->
      with :ok <- ask(call, :await_ready, :queued),
           do: {:ok, call |> terms() |> Map.values() |> Enum.sort_by(& &1.name)}
    end)
  end

  @spec info(GenServer.server(), timeout(), deadline()) ::
          {:ok, map()} | {:error, Exception.t()}
  def info(server, timeout, deadline) do
    with_pool(server, {:info, []}, timeout, deadline, &ask(&1, :info, :queued))
  end

  @doc "`:drain` or `:reload`."
  @spec manage(GenServer.server(), :drain | :reload, timeout(), deadline()) ::
          :ok | {:error, Exception.t()}
  def manage(server, what, timeout, deadline) do
    stage = %{drain: :draining, reload: :reloading}[what]
    with_pool(server, {:manage, [what]}, timeout, deadline, &ask(&1, what, stage))
  end

  defp ask(call, what, stage) do
    with :timeout <- Pool.ask(call.handle.pool, what, Pool.remaining(call.deadline)),
         do: {:error, %TimeoutError{timeout: call.timeout, stage: stage}}
  end

  @type deadline :: integer() | :infinity

  @doc "The moment at which a call that begins now is out of time."
  @spec deadline(timeout()) :: deadline()
  def deadline(:infinity), do: :infinity
  def deadline(timeout), do: System.monotonic_time(:millisecond) + timeout

  # Calls `fun` about the pool of `server`, or our `function` on the node where it is.
  defp with_pool(server, {function, args}, timeout, deadline, fun) do
    unless server?(server) do
      raise ArgumentError,
            "expected the name of a pool, its pid or {name, node}, got: #{inspect(server)}"
    end

    case GenServer.whereis(server) do
      pid when is_pid(pid) and node(pid) == node() ->
        case Handle.of(pid) do
          nil -> {:error, %WorkerError{reason: :not_running, worker: server}}
          handle -> fun.(%{handle: handle, timeout: timeout, deadline: deadline})
        end

      nil ->
        {:error, %WorkerError{reason: :not_running, worker: server}}

      pid when is_pid(pid) ->
        remote(node(pid), function, [pid | args], timeout, deadline)

      {name, node} ->
        remote(node, function, [name | args], timeout, deadline)
    end
  end

  @doc "The name of a pool, whichever way it is called; what it is called by, where nothing runs."
  @spec name(GenServer.server()) :: term()
  def name(pid) when is_pid(pid) and node(pid) == node() do
    with %{config: %{name: name}} <- Handle.of(pid), do: name, else: (nil -> pid)
  end

  def name({name, node}) when is_atom(node) and name not in [:global, :via], do: name
  def name(server), do: server

  defp server?(nil), do: false
  defp server?({:via, module, _term}), do: is_atom(module)
  defp server?({:global, _term}), do: true
  defp server?({name, node}), do: is_atom(name) and is_atom(node)
  defp server?(server), do: is_atom(server) or is_pid(server)

  # The process there does what a caller there does; what is left of the time goes with it, since
  # clocks differ between nodes.
  defp remote(node, function, args, timeout, deadline) do
    left = Pool.remaining(deadline)
    :erpc.call(node, __MODULE__, :serve, [self(), function, args, timeout, left], left)
  catch
    :error, {:erpc, :timeout} -> {:error, %TimeoutError{timeout: timeout, stage: :computing}}
    :error, {:erpc, reason} -> {:error, %WorkerError{reason: {:node, node, reason}}}
    # As here: what MessagePack has no form for.
    :error, {:exception, %ArgumentError{} = error, _stack} -> {:error, error}
    :error, {:exception, reason, _stack} -> {:error, %WorkerError{reason: {:node, node, reason}}}
    :exit, {:exception, reason} -> {:error, %WorkerError{reason: {:node, node, reason}}}
  end

  @doc "Calls one of the functions above for a caller on another node, and not beyond its life."
  def serve(caller, function, args, timeout, left) do
    server = self()

    # Not linked: what goes wrong here is an error there, and no signal.
    spawn(fn ->
      caller = Process.monitor(caller)
      done = Process.monitor(server)

      receive do
        {:DOWN, ^caller, _, _, _} -> Process.exit(server, :kill)
        {:DOWN, ^done, _, _, _} -> :ok
      end
    end)

    apply(__MODULE__, function, args ++ [timeout, deadline(left)])
  end

  # Until the first worker is ready nobody knows the terms.
  defp check(call, request) do
    case terms(call) do
      nil -> :ok
      terms -> Terms.check(request, terms)
    end
  end

  defp terms(%{handle: %{terms: nil, supervisor: supervisor}}) do
    with %{terms: terms} <- Handle.of(supervisor), do: terms
  end

  defp terms(%{handle: %{terms: terms}}), do: terms

  defp async(_regularizers, nil), do: []

  defp async(regularizers, terms),
    do: for(%{name: name, fn: fun} <- regularizers, terms[fun][:async], do: name)

  # As few binaries as its tensors allow, which messages only refer to: a message with a thousand of
  # them takes as long as copying them, and to write them takes twenty times that.
  defp encode(call, request, encoder) do
    id = System.unique_integer([:positive])
    frame = request |> Map.put(:id, id) |> encoder.() |> Frame.to_pieces()
    size = IO.iodata_length(frame)
    max_frame = call.handle.config.max_frame

    if size > max_frame do
      {:error,
       %RequestError{
         reason:
           "the request takes #{size} bytes, more than the #{max_frame} of :max_frame; " <>
             "send fewer datums at a time, or start the pool with a larger :max_frame"
       }}
    else
      {:ok, {id, frame}}
    end
  end

  defp request(call, {id, frame}, if_the_pool_ends) do
    # A late answer goes to an alias that is no more, not to anyone's mailbox.
    ref = :erlang.monitor(:process, call.handle.pool, alias: :demonitor)
    request = %{id: id, caller: self(), reply_to: ref, frame: frame, deadline: call.deadline}
    Pool.request(call.handle.pool, request)
    answer = await(call, ref, :computing)
    Process.demonitor(ref, [:flush])
    flush(ref)

    case answer do
      {:ok, result} -> {:ok, result}
      {:error, %{__exception__: true} = error} -> {:error, error}
      {:error, error} -> {:error, exception(error)}
      {:late, stage} -> late(call, stage)
      {:down, reason} when if_the_pool_ends == :again -> again(call, {id, frame}, reason)
      {:down, reason} -> {:error, %WorkerError{reason: {:stopped, reason}}}
    end
  end

  # The pool tells what happens, and whoever waits tells the handlers, which may be slow.
  defp await(call, ref, stage) do
    receive do
      {^ref, {:answer, answer}} ->
        answer

      {^ref, :granted} ->
        await(call, ref, :computing)

      {^ref, {:queued, length}} ->
        Telemetry.queued(call.handle.config, length)
        await(call, ref, :queued)

      {^ref, {:retry, reason}} ->
        Telemetry.retry(call.handle.config, reason)
        await(call, ref, :queued)

      {:DOWN, ^ref, _, _, reason} ->
        {:down, reason}
    after
      Pool.remaining(call.deadline) -> {:late, stage}
    end
  end

  # What came before the alias was given up. An answer need not be the last of it: that is a worker's,
  # the rest the pool's, and what two processes send keeps no order between them.
  defp flush(ref) do
    receive do
      {^ref, _message} -> flush(ref)
    after
      0 -> :ok
    end
  end

  # The supervisor starts another pool, unless it ends, too.
  defp again(%{handle: %{supervisor: supervisor, pool: pool}} = call, frame, reason) do
    case Handle.of(supervisor) do
      %{pool: other} = handle when other != pool ->
        Telemetry.retry(handle.config, {:stopped, reason})
        request(%{call | handle: handle}, frame, :stop)

      _same_or_none ->
        cond do
          not Process.alive?(supervisor) ->
            {:error, %WorkerError{reason: {:stopped, reason}}}

          Pool.remaining(call.deadline) == 0 ->
            late(call, :queued)

          true ->
            Process.sleep(10)
            again(call, frame, reason)
        end
    end
  end

  defp late(call, stage) do
    Telemetry.deadline(call.handle.config, stage, call.timeout)
    {:error, %TimeoutError{timeout: call.timeout, stage: stage}}
  end

  @doc "The exception that tells of an error of the protocol."
  def exception(%{kind: :request} = error),
    do: %RequestError{reason: error.message, path: error.path}

  def exception(%{kind: kind} = error) when kind in [:term, :deadline] do
    %TermError{
      term: error.term,
      type: error.type,
      reason: error.message,
      traceback: error.traceback,
      datum: error.datum,
      token: error.token,
      timed_out: kind == :deadline
    }
  end

  def exception(%{kind: :protocol, message: sentence}),
    do: %WorkerError{reason: {:protocol, sentence}}

  # internal, and what no worker answers to a request that nobody cancelled.
  def exception(%{message: sentence, traceback: traceback}),
    do: %WorkerError{reason: {:internal, Enum.join([sentence | List.wrap(traceback)], "\n\n")}}
end
