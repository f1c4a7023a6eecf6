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

  alias Tinkex.CustomLoss.Pool.Worker
  alias Tinkex.CustomLoss.Wire.Protocol

  # A computation is pure and may be repeated, but one that ends its process would end them all.
  @attempts 2

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
      with :ok <- check(call, request),
           {:ok, result} <- attempt(call, request, :first, []),
           do: {:ok, Map.put(result, :async, async(request.regularizers, terms(call)))}
    end)
  end

  @doc "The descriptors of the terms, by name."
  @spec terms(GenServer.server(), timeout(), deadline()) ::
          {:ok, [map()]} | {:error, Exception.t()}
  def terms(server, timeout, deadline) do
    with_pool(server, {:terms, []}, timeout, deadline, fn call ->
      case Pool.await_ready(call.handle.pool, Pool.remaining(deadline)) do
        :ok -> {:ok, call |> terms() |> Map.values() |> Enum.sort_by(& &1.name)}
        {:error, %TimeoutError{}} -> late(call, :queued)
        {:error, error} -> {:error, error}
      end
    end)
  end

  @spec info(GenServer.server(), timeout(), deadline()) ::
          {:ok, map()} | {:error, Exception.t()}
  def info(server, timeout, deadline) do
    with_pool(server, {:info, []}, timeout, deadline, fn call ->
      Pool.info(call.handle.pool, Pool.remaining(deadline))
    end)
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
        case Pool.whereis(pid) do
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
    with %{config: %{name: name}} <- Pool.whereis(pid), do: name, else: (nil -> pid)
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

  # Until the first worker is ready nobody knows the terms: a request is then checked when it is
  # given that worker.
  defp check(call, request) do
    case terms(call) do
      nil -> :ok
      terms -> Terms.check(request, terms)
    end
  end

  defp terms(%{handle: %{terms: nil, supervisor: supervisor}}) do
    with %{terms: terms} <- Pool.whereis(supervisor), do: terms
  end

  defp terms(%{handle: %{terms: terms}}), do: terms

  defp async(_regularizers, nil), do: []

  defp async(regularizers, terms),
    do: for(%{name: name, fn: fun} <- regularizers, terms[fun].async, do: name)

  # The id is new for every attempt, so that no two are ever taken for one another.
  defp attempt(call, request, kind, losses) do
    id = System.unique_integer([:positive])
    frame = request |> Map.put(:id, id) |> Protocol.encode_compute()
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
      case Pool.checkout(call.handle.pool, id, kind, call.deadline) do
        {:ok, worker, port} ->
          with {:error, error} <- check(call, request) do
            Pool.abandon(call.handle.pool, id)
            {:error, error}
          else
            :ok -> send_and_wait(call, request, id, {worker, port}, {frame, size}, losses)
          end

        :timeout ->
          late(call, :queued)

        {:error, error} ->
          {:error, error}
      end
    end
  end

  defp send_and_wait(call, request, id, {worker, port}, {frame, size}, losses) do
    # A late answer goes to an alias that is no more, not to anyone's mailbox.
    reply_to = :erlang.monitor(:process, worker, alias: :reply_demonitor)
    Worker.request(worker, port, id, reply_to, frame, size)

    receive do
      {^reply_to, {:result, result}} -> {:ok, result}
      {^reply_to, {:error, error}} -> {:error, exception(error)}
      {^reply_to, {:lost, reason}} -> lost(call, request, [reason | losses])
      {^reply_to, :unsent} -> attempt(call, request, :retry, losses)
      {:DOWN, ^reply_to, _, _, reason} -> lost(call, request, [{:stopped, reason} | losses])
    after
      Pool.remaining(call.deadline) ->
        :erlang.demonitor(reply_to, [:flush])
        Pool.abandon(call.handle.pool, id)

        # It may have come between the two lines above.
        receive do
          {^reply_to, _too_late} -> :ok
        after
          0 -> :ok
        end

        late(call, :computing)
    end
  end

  defp late(call, stage) do
    Telemetry.deadline(call.handle.config, stage, call.timeout)
    {:error, %TimeoutError{timeout: call.timeout, stage: stage}}
  end

  defp lost(call, request, losses) when length(losses) < @attempts do
    Telemetry.retry(call.handle.config, hd(losses))
    attempt(call, request, :retry, losses)
  end

  defp lost(_call, _request, losses),
    do: {:error, %WorkerError{reason: {:lost, Enum.reverse(losses)}}}

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
  def exception(%{message: sentence, traceback: nil}),
    do: %WorkerError{reason: {:internal, sentence}}

  def exception(%{message: sentence, traceback: traceback}),
    do: %WorkerError{reason: {:internal, "#{sentence}\n\n#{traceback}"}}
end
