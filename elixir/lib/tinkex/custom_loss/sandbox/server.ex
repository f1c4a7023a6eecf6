defmodule Tinkex.CustomLoss.Sandbox.Server do
  @moduledoc false
  # The process that holds a sandbox's port: ids for requests, answers for who waits.

  use GenServer

  alias Tinkex.CustomLoss.WorkerError
  alias Tinkex.CustomLoss.Pool.{Call, Log, Python}
  alias Tinkex.CustomLoss.Wire.{Frame, Protocol}

  @doc """
  A task that comes to what `read` makes of the answer.

  The request is with the server when this returns, so that requests keep the order of the calls; the
  task only waits for the answer. Raises `ArgumentError` for a value that MessagePack has no form for.
  """
  def request(server, op, fields, read) do
    pid = GenServer.whereis(server)
    ref = make_ref()
    task = Task.async(fn -> await(server, pid, ref, read) end)

    with {:error, error} <- call(pid, {:request, op, fields, {task.pid, ref}}) do
      Task.shutdown(task, :brutal_kill)
      raise error
    end

    task
  end

  defp call(nil, _request), do: :ok

  defp call(pid, request) do
    GenServer.call(pid, request, :infinity)
  catch
    # The task sees it, too.
    :exit, _ended -> :ok
  end

  defp await(server, nil, _ref, _read) do
    Python.not_started(
      "no sandbox runs as #{inspect(server)}; start it with Tinkex.CustomLoss.Sandbox.start_link/1"
    )
  end

  defp await(_server, pid, ref, read) do
    monitor = Process.monitor(pid)

    receive do
      {^ref, {:ok, result}} -> {:ok, read.(result)}
      {^ref, {:error, error}} -> {:error, Call.exception(error)}
      {:DOWN, ^monitor, _, _, {:shutdown, %WorkerError{} = error}} -> {:error, error}
      {:DOWN, ^monitor, _, _, reason} -> {:error, %WorkerError{reason: reason, worker: pid}}
    end
  end

  @impl true
  def init(config) do
    args = ["tinker_custom_loss.sandbox", "--erlang-port", "--threads", "#{config.threads}"]
    args = args ++ Enum.flat_map(config.load, &["--load", &1])
    args = if config.state, do: args ++ ["--state", Path.expand(config.state)], else: args

    with {:ok, port, _os_pid} <- Python.open(config, args),
         state = %{
           port: port,
           config: config,
           next: 0,
           waiting: %{},
           log: Log.new(config.name, :sandbox)
         },
         {:ok, state} <- await_message("ready", state),
         {:ok, state} <- create_model(state) do
      {:ok, state}
    else
      {:error, error} -> {:stop, {:shutdown, error}}
    end
  end

  defp create_model(%{port: port, config: config, next: id} = state) do
    message = %{"op" => "create_model", "id" => id, "seed" => config.seed}
    command(port, Frame.encode(message))
    await_message("result", %{state | next: id + 1})
  end

  defp await_message(op, %{port: port, config: %{start_timeout: timeout}} = state) do
    receive do
      {^port, {:data, frame}} ->
        case Frame.decode(frame) do
          {:ok, %{"op" => ^op}} -> {:ok, state}
          {:ok, %{"op" => "log"}} -> await_message(op, log(frame, state))
          _other -> Python.not_started("the sandbox did not start: " <> refusal(frame))
        end

      {^port, {:exit_status, status}} ->
        Python.diagnose(state.config, status)
    after
      timeout -> Python.not_started("the sandbox was not ready after #{timeout / 1000} s")
    end
  end

  defp refusal(frame) do
    case Protocol.decode(frame) do
      {:error, _id, %{message: sentence, traceback: nil}} -> sentence
      {:error, _id, %{message: sentence, traceback: traceback}} -> "#{sentence}\n\n#{traceback}"
      _other -> "its first messages were not those that this version knows"
    end
  end

  @impl true
  def handle_call({:request, op, fields, waiting}, _from, state) do
    {:reply, :ok, send_request(state, op, fields, waiting)}
  rescue
    error in ArgumentError -> {:reply, {:error, error}, state}
  end

  @impl true
  def handle_info({port, {:data, frame}}, %{port: port} = state) do
    case Frame.decode(frame) do
      {:ok, %{"op" => "result", "id" => id} = result} -> answer(id, {:ok, result}, state)
      {:ok, %{"op" => "log"}} -> {:noreply, log(frame, state)}
      _other -> refused(Protocol.decode(frame), state)
    end
  end

  def handle_info({port, {:exit_status, status}}, %{port: port} = state),
    do: {:stop, {:shutdown, %WorkerError{reason: {:exited, status}}}, state}

  def handle_info(_other, state), do: {:noreply, state}

  defp refused({:error, id, error}, state) when is_integer(id),
    do: answer(id, {:error, error}, state)

  defp refused(other, state) do
    sentence = "the sandbox said what the protocol does not know: #{inspect(other)}"
    {:stop, {:shutdown, %WorkerError{reason: {:protocol, sentence}}}, state}
  end

  defp answer(id, reply, state) do
    {{pid, ref}, waiting} = Map.pop!(state.waiting, id)
    send(pid, {ref, reply})
    {:noreply, %{state | waiting: waiting}}
  end

  defp send_request(%{port: port, next: id} = state, op, fields, waiting) do
    message = Map.merge(fields, %{"op" => op, "id" => id, "model" => 0})
    command(port, Frame.encode(message))
    %{state | next: id + 1, waiting: Map.put(state.waiting, id, waiting)}
  end

  # A closed port is told by its exit status, too.
  defp command(port, frame) do
    Port.command(port, frame)
  rescue
    ArgumentError -> true
  end

  defp log(frame, state) do
    case Protocol.decode(frame) do
      {:log, record} -> %{state | log: Log.write(state.log, record)}
      _malformed -> state
    end
  end
end
