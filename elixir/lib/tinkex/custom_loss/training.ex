defmodule Tinkex.CustomLoss.Training do
  @moduledoc false
  # forward, loss and gradient, backward, over any client with the functions of Tinkex's.

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Output, Schema}
  alias Tinkex.CustomLoss.Wire.Data

  def forward_backward_custom(server, training_client, data, options) do
    client = client!(training_client)
    check!(data)
    {:ok, Task.async(fn -> step(server, client, data, options) end)}
  end

  def forward_backward(server, training_client, data, loss_fn, options) do
    client = client!(training_client)
    check!(data)

    unless is_atom(loss_fn) or is_binary(loss_fn) do
      raise ArgumentError,
            "expected loss_fn to be the name of a loss of the server's, such as :ppo, " <>
              "got: #{inspect(loss_fn)}"
    end

    {:ok, Task.async(fn -> native_step(server, client, data, loss_fn, options) end)}
  end

  defp check!(data) do
    unless data != [] and Schema.proper?(data) do
      raise ArgumentError, "expected data to be a list of datums, got: #{inspect(data)}"
    end
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
         {:ok, forward} <- call(client, :forward, sent(data, :cross_entropy), options),
         {:ok, output, _result} <-
           CustomLoss.run(server, data, forward.loss_fn_outputs, options, :batch),
         linear = Data.linear(data, output.gradients),
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

  # The call as it is; then the regularizers, from the logprobs that it returned.
  defp native_step(server, client, data, loss_fn, options) do
    started = System.monotonic_time()

    with :ok <- check(server, data, options),
         {:ok, base} <-
           call(client, :forward_backward, sent(data, loss_fn), loss_fn, options.client_opts),
         seconds =
           (System.monotonic_time() - started) / System.convert_time_unit(1, :second, :native),
         {:ok, output, _result} <-
           CustomLoss.run(server, data, base.loss_fn_outputs, options, :batch),
         {:ok, surrogate} <- add(client, data, output, options) do
      record = native_record(output, base.metrics["loss:sum"] || :nan, seconds)
      record = if options.metrics == :flat, do: Output.flat(record), else: record
      surrogate = if surrogate, do: %{"surrogate_loss:sum" => surrogate}, else: %{}
      {:ok, %{base | metrics: record |> Map.merge(base.metrics) |> Map.merge(surrogate)}}
    end
  rescue
    error in ArgumentError -> {:error, error}
  end

  # Nothing is sent where nothing is added.
  defp add(client, data, output, options) do
    if output.record["total_grad_norm"] == 0.0 do
      {:ok, 0.0}
    else
      with {:ok, backward} <-
             call(client, :forward_backward, Data.linear(data, output.gradients), options),
           do: {:ok, (backward.metrics || %{})["loss:sum"]}
    end
  end

  # The configuration is that of the server's own loss.
  defp call(client, function, data, options) do
    client_opts = Keyword.delete(options.client_opts, :loss_fn_config)
    call(client, function, data, :cross_entropy, client_opts)
  end

  defp call({module, ref}, function, data, loss_fn, client_opts) do
    with {:ok, task} <- apply(module, function, [ref, data, loss_fn, client_opts]),
         do: Task.await(task, :infinity)
  end

  # What else is among the inputs is for the terms: the server refuses what its loss does not know.
  # What another loss takes is not known here; its datums are sent as they are.
  @policy ["target_tokens", "logprobs", "advantages", :target_tokens, :logprobs, :advantages]
  @inputs %{
    "cross_entropy" => ["target_tokens", "weights", :target_tokens, :weights],
    "importance_sampling" => @policy,
    "ppo" => @policy,
    "cispo" => @policy,
    "dro" => @policy
  }

  defp sent(data, loss_fn) do
    case @inputs[to_string(loss_fn)] do
      nil -> data
      known -> Enum.map(data, &take(&1, known))
    end
  end

  defp take(%{loss_fn_inputs: %{} = inputs} = datum, known),
    do: %{datum | loss_fn_inputs: Map.take(inputs, known)}

  defp take(%{"loss_fn_inputs" => %{} = inputs} = datum, known),
    do: %{datum | "loss_fn_inputs" => Map.take(inputs, known)}

  defp take(datum, _known), do: datum

  # The record with the server's loss as the base loss: its gradient with respect to the logprobs is
  # not known here, nor what depends on it.
  defp native_record(output, value, seconds) do
    regularizers =
      Map.new(output.record["regularizers"], fn {name, each} ->
        {name, %{each | "cosine_to_total" => nil}}
      end)

    Map.merge(output.record, %{
      "loss_total" => if(is_number(value), do: value + output.loss_total, else: :nan),
      "base_loss" => %{
        "value" => value,
        "grad_norm" => nil,
        "grad_rms" => nil,
        "cosine_to_total" => nil,
        "differentiable" => true,
        "zero_gradient" => nil,
        "seconds" => seconds,
        "non_finite_zeroed" => 0,
        "custom" => %{}
      },
      "regularizers" => regularizers,
      "total_grad_norm" => nil,
      "total_grad_rms" => nil
    })
  end

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
