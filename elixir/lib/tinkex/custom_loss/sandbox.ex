defmodule Tinkex.CustomLoss.Sandbox do
  @moduledoc """
  A training client without Tinker: a tiny language model in a Python process on this machine.

  Its tokens are bytes, and a step takes milliseconds on one CPU core. It is for tests, demos and
  first steps; `forward/4`, `forward_backward/4` and `optim_step/3` are those of
  `Tinkex.TrainingClient`.

      {:ok, pid} = Tinkex.CustomLoss.Sandbox.start_link(seed: 0)
      client = {Tinkex.CustomLoss.Sandbox, pid}

      {:ok, task} = Tinkex.CustomLoss.forward_backward_custom(MyLoss, client, data, base_loss: :nll)
      {:ok, output} = Task.await(task)
      {:ok, task} = Tinkex.CustomLoss.Sandbox.optim_step(pid, %{learning_rate: 0.01})
      {:ok, _} = Task.await(task)

  Calls of one process are carried out in their order, awaited or not. A task comes to
  `{:error, exception}` if Python refused the request, or ended. The model ends with the process:
  nothing is saved, and a supervisor does not start it again, since that would be another model.

  ## Options

  #{Tinkex.CustomLoss.Options.sandbox_docs()}
  """

  use GenServer, restart: :temporary

  alias Tinkex.CustomLoss.{Options, Regularizer, Schema, WorkerError}
  alias Tinkex.CustomLoss.Pool.{Call, Log, Python}
  alias Tinkex.CustomLoss.Wire.{Batch, Data, Frame, Numbers, Protocol}

  @type server :: GenServer.server()

  @typedoc "Of the shape of Tinkex's `ForwardBackwardOutput`."
  @type output :: %{
          loss_fn_output_type: String.t(),
          loss_fn_outputs: [%{String.t() => %{String.t() => term()}}],
          metrics: %{String.t() => float()}
        }

  @typep vector :: {binary(), [non_neg_integer()]}

  @doc """
  Starts a model, linked to the caller; returns when it is ready, or with the error why it is not.

  As with any `start_link`, a caller that does not trap exits ends with a model that does not start.
  """
  @spec start_link(keyword()) :: GenServer.on_start()
  def start_link(opts \\ []) do
    config = Options.sandbox!(opts)
    name = if config.name, do: [name: config.name], else: []

    with {:error, {:shutdown, %_{} = error}} <- GenServer.start_link(__MODULE__, config, name),
         do: {:error, error}
  end

  @doc """
  The model's logprobs of the target tokens of `data`, in their shapes, and the loss.

  `loss_fn` is `:cross_entropy`. Options of Tinkex's client concern the network and change nothing
  here.
  """
  @spec forward(server(), [Data.datum()], :cross_entropy | String.t(), keyword()) ::
          {:ok, Task.t()}
  def forward(server, data, loss_fn, opts \\ []),
    do: {:ok, train(server, "forward", data, loss_fn, opts)}

  @doc """
  The same, and the gradient of `Σ -logprob · weight` is added to what is accumulated.
  """
  @spec forward_backward(server(), [Data.datum()], :cross_entropy | String.t(), keyword()) ::
          {:ok, Task.t()}
  def forward_backward(server, data, loss_fn, opts \\ []),
    do: {:ok, train(server, "forward_backward", data, loss_fn, opts)}

  @doc """
  One step of AdamW on the accumulated gradient, which is zero afterwards.

  `params` are those of `Tinkex.Types.AdamParams`, as such or as a map or keyword list:
  `:learning_rate`, `:beta1`, `:beta2`, `:eps`, `:weight_decay`, `:grad_clip_norm`.
  """
  @spec optim_step(server(), map() | keyword(), keyword()) :: {:ok, Task.t()}
  def optim_step(server, params, opts \\ []) do
    check_opts!(opts)
    {:ok, request(server, "optim_step", %{"adam_params" => adam_params!(params)}, &metrics/1)}
  end

  @doc "All parameters, float32."
  @spec parameters(server()) :: {:ok, vector()} | {:error, Exception.t()}
  def parameters(server), do: ask(server, "parameters", %{}, &vector(&1["parameters"]))

  @doc "The accumulated gradient of all parameters, float32."
  @spec parameter_gradients(server()) :: {:ok, vector()} | {:error, Exception.t()}
  def parameter_gradients(server),
    do: ask(server, "parameter_gradients", %{}, &vector(&1["gradients"]))

  @doc """
  Compares the gradient that training on a custom loss takes with the one it ought to take.

  The one is the parameter gradient of the linear loss with `weights = -gradient`; the other is
  PyTorch's through the terms and the model at once. Returns the largest absolute difference and the
  largest absolute gradient. `opts` are `:base_loss`, `:regularizers` and `:step` of
  `Tinkex.CustomLoss.compute/4`; functions of the user come from the modules in the sandbox's
  own `:load`.
  """
  @spec check_gradient(server(), [Data.datum()], keyword()) ::
          {:ok, %{max_abs_difference: float(), max_abs_gradient: float()}}
          | {:error, Exception.t()}
  def check_gradient(server, data, opts) do
    options = Options.check!(opts)

    fields = %{
      "data" => data!(data),
      "base_loss" => Protocol.term(options.base_loss),
      "regularizers" =>
        Enum.map(options.regularizers, &(&1 |> Regularizer.to_wire() |> Protocol.term())),
      "step" => options.step
    }

    ask(server, "check_gradient", fields, fn result ->
      %{
        max_abs_difference: result["max_abs_difference"],
        max_abs_gradient: result["max_abs_gradient"]
      }
    end)
  end

  defp train(server, op, data, loss_fn, opts) do
    unless loss_fn in [:cross_entropy, "cross_entropy"] do
      raise ArgumentError,
            "the sandbox computes :cross_entropy alone, not #{inspect(loss_fn)}; " <>
              "any other loss is a custom loss of the logprobs"
    end

    check_opts!(opts)
    request(server, op, %{"data" => data!(data)}, &output/1)
  end

  defp check_opts!(opts) do
    unless Keyword.keyword?(opts),
      do: raise(ArgumentError, "expected a keyword list of options, got: #{inspect(opts)}")
  end

  defp data!(data) do
    unless data != [] and Schema.proper?(data),
      do: raise(ArgumentError, "expected data to be a list of datums, got: #{inspect(data)}")

    Data.to_wire(data, length(data))
  end

  defp adam_params!(%_{} = params), do: params |> Map.from_struct() |> adam_params!()

  defp adam_params!(params) do
    unless is_map(params) or Keyword.keyword?(params) do
      raise ArgumentError,
            "expected the parameters of AdamW as a map or keyword list, got: #{inspect(params)}"
    end

    Map.new(params, fn {name, value} -> {to_string(name), value} end)
  end

  defp ask(server, op, fields, read),
    do: server |> request(op, fields, read) |> Task.await(:infinity)

  # The request is with the server when this returns, so that requests keep the order of the calls;
  # the task only waits for the answer.
  defp request(server, op, fields, read) do
    pid = GenServer.whereis(server)
    ref = make_ref()
    task = Task.async(fn -> await(server, pid, ref, read) end)

    try do
      if pid, do: GenServer.call(pid, {:request, op, fields, {task.pid, ref}}, :infinity)
    catch
      # The task sees it, too.
      :exit, _ended -> :ok
    end

    task
  end

  defp await(server, nil, _ref, _read) do
    Python.not_started(
      "no sandbox runs as #{inspect(server)}; start it with #{inspect(__MODULE__)}.start_link/1"
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

  defp output(result) do
    {:ok, %Batch{dtype: dtype} = logprobs} = Batch.from_wire(result["logprobs"])

    outputs =
      Enum.zip_with(Batch.parts(logprobs), logprobs.shapes, fn part, shape ->
        data = Numbers.unpack(part, dtype)
        %{"logprobs" => %{"data" => data, "dtype" => "#{dtype}", "shape" => shape}}
      end)

    result
    |> metrics()
    |> Map.merge(%{loss_fn_output_type: "ArrayRecord", loss_fn_outputs: outputs})
  end

  defp metrics(result), do: %{metrics: result["metrics"]}

  defp vector(wire) do
    {:ok, %Batch{shapes: [shape], data: data}} = Batch.from_wire(wire)
    {data, shape}
  end

  # The server: ids for requests, answers for who waits.

  @impl true
  def init(config) do
    args = ["tinker_custom_loss.sandbox", "--erlang-port", "--threads", "#{config.threads}"]
    args = args ++ Enum.flat_map(config.load, &["--load", &1])

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
  def handle_call({:request, op, fields, waiting}, _from, state),
    do: {:reply, :ok, send_request(state, op, fields, waiting)}

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
