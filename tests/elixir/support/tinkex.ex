# Tinkex cannot be fetched where these tests must run. These are its structs, of Tinkex 0.4.0, as far
# as a step touches them.
unless Code.ensure_loaded?(Tinkex.TrainingClient) do
  defmodule Tinkex.Types.EncodedTextChunk do
    @moduledoc false
    defstruct [:tokens, type: "encoded_text"]
  end

  defmodule Tinkex.Types.ImageChunk do
    @moduledoc false
    defstruct [:data, :format, :expected_tokens, type: "image"]
  end

  defmodule Tinkex.Types.ImageAssetPointerChunk do
    @moduledoc false
    defstruct [:location, :format, :expected_tokens, type: "image_asset_pointer"]
  end

  defmodule Tinkex.Types.ModelInput do
    @moduledoc false
    defstruct chunks: []

    def from_ints(tokens),
      do: %__MODULE__{chunks: [%Tinkex.Types.EncodedTextChunk{tokens: tokens}]}
  end

  defmodule Tinkex.Types.TensorData do
    @moduledoc false
    defstruct [:data, :dtype, :shape]
  end

  defmodule Tinkex.Types.Datum do
    @moduledoc false
    defstruct [:model_input, loss_fn_inputs: %{}]
  end

  defmodule Tinkex.Types.ForwardBackwardOutput do
    @moduledoc false
    defstruct [:loss_fn_output_type, loss_fn_outputs: [], metrics: %{}]
  end

  defmodule Tinkex.Types.AdamParams do
    @moduledoc false
    defstruct learning_rate: 0.0001, beta1: 0.9, beta2: 0.95, eps: 1.0e-12
  end

  defmodule Tinkex.Error do
    @moduledoc false
    defstruct [:message, :type, :status, :category, :data, :retry_after_ms]
  end
end

defmodule Tinkex.CustomLoss.Test.TrainingClient do
  @moduledoc """
  Stands in for `Tinkex.TrainingClient`, and for the server behind it.

  Its model has a parameter a logprob, which is that logprob: the cross-entropy `Σ -logprob · weight`
  has the gradient `-weight`, and a step of `optim_step/3` is one of plain descent. Requests are
  numbered when they are made and served by number, as Tinkex and Tinker do: one whose number does
  not follow, because the one before it was never sent, would wait for ever and is refused.
  """

  alias Tinkex.Types.{ForwardBackwardOutput, TensorData}

  @doc "A client whose logprobs are a multiple of -1/8, datum by datum."
  def start_link do
    Agent.start_link(fn -> %{reserved: 0, served: 0, model: %{}, gradient: %{}, sent: []} end)
  end

  @doc "What was sent backward, the last first."
  def sent(client), do: Agent.get(client, & &1.sent)

  def forward(client, data, :cross_entropy, _opts \\ []) do
    [number] = reserve(client, 1)
    {:ok, Task.async(fn -> serve(client, number, &{outputs(&1, data), &1}) end)}
  end

  def forward_backward(client, data, :cross_entropy, _opts \\ []) do
    [number] = reserve(client, 1)
    {:ok, Task.async(fn -> serve(client, number, &backward(&1, data)) end)}
  end

  def optim_step(client, adam_params, _opts \\ []) do
    [number] = reserve(client, 1)

    {:ok,
     Task.async(fn ->
       serve(client, number, fn state ->
         descend = fn _key, value, gradient -> value - adam_params.learning_rate * gradient end
         {%{}, %{state | model: Map.merge(state.model, state.gradient, descend), gradient: %{}}}
       end)
     end)}
  end

  @doc "The steps of Tinkex's own, in their order."
  def forward_backward_custom(client, data, loss_fn, _opts \\ []) do
    {:ok,
     Task.async(fn ->
       [forward, backward] = reserve(client, 2)

       try do
         {:ok, output} = serve(client, forward, &{outputs(&1, data), &1})
         logprobs = Enum.map(output.loss_fn_outputs, &tensor/1)
         {_loss, metrics} = loss_fn.(data, logprobs)

         gradients =
           Nx.Defn.grad(List.to_tuple(logprobs), fn traced ->
             {loss, _metrics} = loss_fn.(data, Tuple.to_list(traced))
             loss
           end)

         linear =
           Enum.zip_with(data, Tuple.to_list(gradients), fn datum, gradient ->
             weights = for <<g::float-32-little <- Nx.to_binary(gradient)>>, do: -g
             shape = Tuple.to_list(Nx.shape(gradient))
             weights = %TensorData{data: weights, dtype: :float32, shape: shape}
             targets = datum.loss_fn_inputs["target_tokens"]
             %{datum | loss_fn_inputs: %{"target_tokens" => targets, "weights" => weights}}
           end)

         {:ok, output} = serve(client, backward, &backward(&1, linear))
         metrics = Map.new(metrics, fn {key, value} -> {to_string(key), value} end)
         {:ok, %{output | metrics: Map.merge(output.metrics, metrics)}}
       rescue
         error ->
           {:error,
            %Tinkex.Error{
              message: "Custom loss failed: #{Exception.message(error)}",
              type: :request_failed,
              data: %{exception: error}
            }}
       end
     end)}
  end

  defp reserve(client, count) do
    Agent.get_and_update(client, fn %{reserved: last} = state ->
      {Enum.to_list((last + 1)..(last + count)), %{state | reserved: last + count}}
    end)
  end

  defp serve(client, number, fun) do
    Agent.get_and_update(client, fn state ->
      if number == state.served + 1 do
        {answer, state} = fun.(state)
        {{:ok, answer}, %{state | served: number}}
      else
        message = "request #{number} waits for request #{state.served + 1}"
        {{:error, %Tinkex.Error{message: message, type: :api_timeout}}, state}
      end
    end)
  end

  defp outputs(state, data) do
    outputs =
      for {datum, index} <- Enum.with_index(data) do
        targets = datum.loss_fn_inputs["target_tokens"]
        values = for position <- positions(targets), do: logprob(state, {index, position})
        shape = targets.shape || [length(values)]
        %{"logprobs" => %{"data" => values, "dtype" => "float32", "shape" => shape}}
      end

    %ForwardBackwardOutput{loss_fn_output_type: "ArrayRecord", loss_fn_outputs: outputs}
  end

  defp backward(state, data) do
    weights =
      for {datum, index} <- Enum.with_index(data),
          {weight, position} <- Enum.with_index(datum.loss_fn_inputs["weights"].data),
          into: %{},
          do: {{index, position}, weight}

    losses = for {key, weight} <- weights, do: -logprob(state, key) * weight
    model = Map.new(weights, fn {key, _weight} -> {key, logprob(state, key)} end)
    gradient = Map.new(weights, fn {key, weight} -> {key, -weight} end)
    output = %{outputs(state, data) | metrics: %{"loss:sum" => Enum.sum(losses)}}
    {output, %{state | model: model, gradient: gradient, sent: [data | state.sent]}}
  end

  defp positions(%{data: values}), do: Enum.to_list(0..(length(values) - 1))

  defp logprob(state, {index, position} = key),
    do: Map.get(state.model, key, -(1 + rem(7 * index + 3 * position, 23)) / 8)

  defp tensor(%{"logprobs" => %{"data" => values, "shape" => shape}}) do
    for(value <- values, into: <<>>, do: <<value::float-32-little>>)
    |> Nx.from_binary({:f, 32})
    |> Nx.reshape(List.to_tuple(shape))
  end
end
