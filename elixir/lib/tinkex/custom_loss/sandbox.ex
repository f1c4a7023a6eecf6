defmodule Tinkex.CustomLoss.Sandbox do
  @moduledoc """
  A training client without Tinker: a tiny language model in a Python process on this machine.

  Its tokens are bytes, and a step takes milliseconds on one CPU core. It is for tests, demos and
  first steps. The functions that train, save and load are those of `Tinkex.TrainingClient`; `sample/4`
  and `compute_logprobs/3` are those of `Tinkex.SamplingClient`.

      {:ok, pid} = Tinkex.CustomLoss.Sandbox.start_link(seed: 0)
      client = {Tinkex.CustomLoss.Sandbox, pid}

      {:ok, task} = Tinkex.CustomLoss.forward_backward_custom(MyLoss, client, data, base_loss: :nll)
      {:ok, output} = Task.await(task)
      {:ok, task} = Tinkex.CustomLoss.Sandbox.optim_step(pid, %{learning_rate: 0.01})
      {:ok, _} = Task.await(task)

  Calls of one process are carried out in their order, awaited or not. A task comes to
  `{:error, exception}` if Python refused the request, or ended. The model ends with the process, and a
  supervisor does not start it again, since that would be another model. What `save_state/3` saved
  ends with it, too, unless the option `:state` names a directory for it.

  ## Options

  #{Tinkex.CustomLoss.Options.sandbox_docs()}
  """

  alias Tinkex.CustomLoss.{Options, Regularizer, Schema}
  alias Tinkex.CustomLoss.Sandbox.Server
  alias Tinkex.CustomLoss.Wire.{Batch, Data, Numbers, Protocol}

  defmodule Sampler do
    @moduledoc """
    Weights of a sandbox that nobody trains: what `Tinkex.CustomLoss.Sandbox.sample/4` draws from.
    """
    @enforce_keys [:server, :number]
    defstruct [:server, :number]

    @opaque t :: %__MODULE__{}
  end

  @type server :: GenServer.server()

  @typedoc "One of the service's, by name."
  @type loss_fn :: atom() | String.t()

  @typedoc "Of the shape of Tinkex's `ForwardBackwardOutput`."
  @type output :: %{
          loss_fn_output_type: String.t(),
          loss_fn_outputs: [%{String.t() => %{String.t() => term()}}],
          metrics: %{String.t() => float()}
        }

  @typedoc "Of the shape of Tinkex's `SampleResponse`."
  @type samples :: %{
          sequences: [
            %{tokens: [integer()], logprobs: [float()], stop_reason: :length | :stop}
          ],
          prompt_logprobs: [float() | nil] | nil
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

    with {:error, {:shutdown, %_{} = error}} <- GenServer.start_link(Server, config, name),
         do: {:error, error}
  end

  @doc false
  def child_spec(opts),
    do: %{id: __MODULE__, start: {__MODULE__, :start_link, [opts]}, restart: :temporary}

  @doc """
  The model's logprobs of the target tokens of `data`, in their shapes, and the loss.

  `loss_fn` is one of `:cross_entropy`, `:importance_sampling`, `:ppo`, `:cispo` and `:dro`, sums over
  tokens; `loss_fn_config: %{"beta" => 0.1}` among the options replaces its defaults. Other options of
  Tinkex's client concern the network and change nothing here. See docs/sandbox.md.
  """
  @spec forward(server(), [Data.datum()], loss_fn(), keyword()) :: {:ok, Task.t()}
  def forward(server, data, loss_fn, opts \\ []),
    do: {:ok, train(server, "forward", data, loss_fn, opts)}

  @doc """
  The same, and the gradient of the loss is added to what is accumulated.
  """
  @spec forward_backward(server(), [Data.datum()], loss_fn(), keyword()) :: {:ok, Task.t()}
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
    params = fields!(params, "the parameters of AdamW")
    {:ok, Server.request(server, "optim_step", %{"adam_params" => params}, &metrics/1)}
  end

  @doc """
  A client that samples from the weights as they are now; training does not change it.

  The task comes to `{:ok, sampler}`. The latest 128 of a sandbox are kept.
  """
  @spec save_weights_and_get_sampling_client(server(), keyword()) :: {:ok, Task.t()}
  def save_weights_and_get_sampling_client(server, opts \\ []) do
    check_opts!(opts)
    read = &%Sampler{server: server, number: &1["sampler"]}
    {:ok, Server.request(server, "save_for_sampling", %{}, read)}
  end

  @doc """
  Draws texts that go on from `prompt`, a `ModelInput` or a list of tokens.

  `params` are those of `Tinkex.Types.SamplingParams`, as such or as a map or keyword list:
  `:max_tokens`, `:temperature`, `:top_k`, `:top_p`, `:stop`, `:seed`. Options are `:num_samples`, 1 by
  default, and `:prompt_logprobs`. The task comes to `{:ok, samples}`, whose logprobs are the model's
  own, whatever the temperature; without a `:seed` every call draws others, the same ones in
  every run.
  """
  @spec sample(Sampler.t(), map() | [integer()], map() | keyword(), keyword()) :: {:ok, Task.t()}
  def sample(%Sampler{} = sampler, prompt, params, opts \\ []) do
    options = Options.sample!(opts)

    fields = %{
      "sampler" => sampler.number,
      "prompt" => prompt!(prompt),
      "sampling_params" => fields!(params, "sampling parameters"),
      "num_samples" => options.num_samples,
      "prompt_logprobs" => options.prompt_logprobs
    }

    {:ok, Server.request(sampler.server, "sample", fields, &samples/1)}
  end

  @doc """
  The logprob of each token of `prompt`, given those before it; nil for the first.

  The task comes to `{:ok, logprobs}`.
  """
  @spec compute_logprobs(Sampler.t(), map() | [integer()], keyword()) :: {:ok, Task.t()}
  def compute_logprobs(%Sampler{} = sampler, prompt, opts \\ []) do
    check_opts!(opts)

    fields = %{
      "sampler" => sampler.number,
      "prompt" => prompt!(prompt),
      "sampling_params" => %{"max_tokens" => 1},
      "prompt_logprobs" => true
    }

    {:ok, Server.request(sampler.server, "sample", fields, &samples(&1).prompt_logprobs)}
  end

  @doc """
  Saves the parameters and AdamW's moments under a name; the task comes to `{:ok, %{path: path}}`.

  With `overwrite: true`, also under a name that is taken.
  """
  @spec save_state(server(), String.t(), keyword()) :: {:ok, Task.t()}
  def save_state(server, name, opts \\ []) do
    check_opts!(opts)
    fields = %{"name" => name!(name), "overwrite" => opts[:overwrite] == true}
    {:ok, Server.request(server, "save_state", fields, &%{path: &1["path"]})}
  end

  @doc """
  Makes the model what was saved under a path, with AdamW's moments zero; it may be of another sandbox,
  where both have one directory as `:state`.

  What has been accumulated is forgotten. The task comes to `{:ok, %{path: path}}`.
  """
  @spec load_state(server(), String.t(), keyword()) :: {:ok, Task.t()}
  def load_state(server, path, opts \\ []), do: load(server, path, false, opts)

  @doc "As `load_state/3`, with AdamW's moments: training goes on to the same parameters, bit for bit."
  @spec load_state_with_optimizer(server(), String.t(), keyword()) :: {:ok, Task.t()}
  def load_state_with_optimizer(server, path, opts \\ []), do: load(server, path, true, opts)

  defp load(server, path, optimizer, opts) do
    check_opts!(opts)
    fields = %{"path" => name!(path), "optimizer" => optimizer}
    {:ok, Server.request(server, "load_state", fields, &%{path: &1["path"]})}
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
    unless is_binary(loss_fn) or (is_atom(loss_fn) and loss_fn not in [nil, true, false]) do
      raise ArgumentError,
            "expected loss_fn to be the name of a loss, such as :ppo, got: #{inspect(loss_fn)}"
    end

    check_opts!(opts)
    fields = %{"data" => data!(data), "loss_fn" => to_string(loss_fn)}
    config = opts[:loss_fn_config]
    config = if config, do: fields!(config, "loss_fn_config")
    Server.request(server, op, Map.put(fields, "loss_fn_config", config), &output/1)
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

  # Of the wire: names and numbers, however they were given.
  defp fields!(%_{} = fields, what), do: fields |> Map.from_struct() |> fields!(what)

  defp fields!(fields, what) do
    unless is_map(fields) or Keyword.keyword?(fields) do
      raise ArgumentError,
            "expected #{what} as a map or keyword list, got: #{inspect(fields)}"
    end

    Map.new(fields, fn {name, value} -> {to_string(name), value} end)
  end

  defp name!(name) when is_binary(name), do: name

  defp name!(other),
    do: raise(ArgumentError, "expected a checkpoint's name as a string, got: #{inspect(other)}")

  defp prompt!(prompt) do
    case Data.to_wire([%{model_input: prompt}], 1) do
      %{"tokens" => %Batch{} = tokens} -> %{tokens | forms: []}
      _ -> raise ArgumentError, "expected a prompt of text, got: #{inspect(prompt)}"
    end
  end

  defp ask(server, op, fields, read),
    do: server |> Server.request(op, fields, read) |> Task.await(:infinity)

  defp output(result) do
    outputs =
      for {data, dtype, shape} <- tensors(result["logprobs"]),
          do: %{"logprobs" => %{"data" => data, "dtype" => "#{dtype}", "shape" => shape}}

    result
    |> metrics()
    |> Map.merge(%{loss_fn_output_type: "ArrayRecord", loss_fn_outputs: outputs})
  end

  defp samples(result) do
    sequences =
      [parts(result["tokens"]), tensors(result["logprobs"]), result["stopped"]]
      |> Enum.zip_with(fn [{part, :int64, _}, {logprobs, _, _}, stopped] ->
        tokens = for <<token::little-signed-64 <- part>>, do: token
        stop_reason = if stopped, do: :stop, else: :length
        %{tokens: tokens, logprobs: logprobs, stop_reason: stop_reason}
      end)

    %{sequences: sequences, prompt_logprobs: prompt_logprobs(result["prompt_logprobs"])}
  end

  defp prompt_logprobs(nil), do: nil

  # There is none of the first token.
  defp prompt_logprobs(batch) do
    [{[:nan | logprobs], _dtype, _shape}] = tensors(batch)
    [nil | logprobs]
  end

  defp tensors(wire),
    do: for({part, dtype, shape} <- parts(wire), do: {Numbers.unpack(part, dtype), dtype, shape})

  defp parts(wire) do
    {:ok, %Batch{dtype: dtype} = batch} = Batch.from_wire(wire)
    Enum.zip_with(Batch.parts(batch), batch.shapes, &{&1, dtype, &2})
  end

  defp metrics(result), do: %{metrics: result["metrics"]}

  defp vector(wire) do
    {:ok, %Batch{shapes: [shape], data: data}} = Batch.from_wire(wire)
    {data, shape}
  end
end
