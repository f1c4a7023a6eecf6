defmodule Tinkex.CustomLoss.Training do
  @moduledoc false
  # forward, loss and gradient, backward, over any client with the functions of Tinkex's.

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Output, Schema}
  alias Tinkex.CustomLoss.Wire.Data

  def forward_backward_custom(server, training_client, data, options) do
    client = client!(training_client)

    unless data != [] and Schema.proper?(data) do
      raise ArgumentError, "expected data to be a list of datums, got: #{inspect(data)}"
    end

    {:ok, Task.async(fn -> step(server, client, data, options) end)}
  end

  defp client!({module, _ref} = client) when is_atom(module) do
    for function <- [:forward, :forward_backward] do
      unless Code.ensure_loaded?(module) and function_exported?(module, function, 4) do
        raise ArgumentError, "#{inspect(module)} is no training client: it lacks #{function}/4"
      end
    end

    client
  end

  defp client!(client) when is_pid(client) or is_atom(client) do
    unless Code.ensure_loaded?(Tinkex.TrainingClient) do
      raise ArgumentError,
            "#{inspect(client)} would be a client of Tinkex, which is not there: add :tinkex to " <>
              "your dependencies, or give {module, ref}"
    end

    client!({Tinkex.TrainingClient, client})
  end

  defp client!(other) do
    raise ArgumentError,
          "expected a Tinkex training client or {module, ref}, got: #{inspect(other)}"
  end

  # Each task is awaited before the next call: calls that overlap may arrive in another order.
  defp step(server, client, data, options) do
    with :ok <- check(server, data, options),
         {:ok, forward} <- call(client, :forward, Enum.map(data, &sent/1), options),
         {:ok, output, %{gradients: gradients}} <-
           CustomLoss.run(server, data, forward.loss_fn_outputs, options),
         linear = Data.linear(data, gradients),
         {:ok, backward} <- call(client, :forward_backward, linear, options) do
      {:ok, %{backward | metrics: metrics(backward.metrics, output, options.metrics)}}
    end
  rescue
    # What a datum or an output of the client lacks.
    error in ArgumentError -> {:error, error}
  end

  # Before anything is sent.
  defp check(_server, _data, %{totals: nil}), do: :ok

  defp check(server, data, options) do
    with {:ok, _own} <- CustomLoss.count(server, data, options), do: :ok
  end

  defp call({module, ref}, function, data, options) do
    with {:ok, task} <- apply(module, function, [ref, data, :cross_entropy, options.client_opts]),
         do: Task.await(task, :infinity)
  end

  # What else is among the inputs is for the terms; the server's cross-entropy knows these two.
  @sent ["target_tokens", "weights", :target_tokens, :weights]

  defp sent(%{loss_fn_inputs: %{} = inputs} = datum),
    do: %{datum | loss_fn_inputs: Map.take(inputs, @sent)}

  defp sent(%{"loss_fn_inputs" => %{} = inputs} = datum),
    do: %{datum | "loss_fn_inputs" => Map.take(inputs, @sent)}

  defp sent(datum), do: datum

  @doc """
  The metrics of a training client with those of the custom loss: the record of the step, and the
  base loss's own metrics under their own names, where a client without regularizers has them.
  """
  def metrics(metrics, output, form) do
    metrics = metrics || %{}
    own = get_in(output.record, ["base_loss", "custom"]) || %{}

    {own, record} =
      case form do
        :flat -> {Map.filter(own, fn {_, value} -> is_number(value) end), Output.flat(output)}
        :nested -> {own, output.record}
      end

    surrogate =
      Map.take(metrics, ["loss:sum"]) |> Map.new(fn {_, v} -> {"surrogate_loss:sum", v} end)

    metrics
    |> Map.merge(own)
    |> Map.merge(surrogate)
    |> Map.merge(record)
    |> Map.put("loss:sum", output.loss_total)
  end
end
