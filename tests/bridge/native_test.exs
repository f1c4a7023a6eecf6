defmodule Tinkex.CustomLoss.NativeTest do
  # The server's own losses with regularizers, against a model that computes both.
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Sandbox, TermError}

  defmodule Client do
    # The sandbox, which tells the test what it is asked for.

    def forward({pid, to}, data, loss_fn, opts) do
      send(to, {:forward, loss_fn, opts})
      Sandbox.forward(pid, data, loss_fn, opts)
    end

    def forward_backward({pid, to}, data, loss_fn, opts) do
      send(to, {:forward_backward, loss_fn, opts})
      Sandbox.forward_backward(pid, data, loss_fn, opts)
    end
  end

  defmodule Faulty do
    # The sandbox on a bad day: `fault` is made of the answer to a server's own loss.

    def forward({pid, _fault}, data, loss_fn, opts), do: Sandbox.forward(pid, data, loss_fn, opts)

    def forward_backward({pid, _fault}, data, :cross_entropy, opts),
      do: Sandbox.forward_backward(pid, data, :cross_entropy, opts)

    def forward_backward({pid, fault}, data, loss_fn, opts) do
      {:ok, task} = Sandbox.forward_backward(pid, data, loss_fn, opts)
      {:ok, output} = Task.await(task, 60_000)
      {:ok, Task.async(fn -> fault.(output) end)}
    end
  end

  @regularizers [
    %{name: "squares", fn: "pathological:squares", weight: 0.01},
    %{name: "kl", fn: :kl, weight: 0.3}
  ]

  # The loss of the server, and the term of the catalogue that is the same.
  @losses [
    {:cross_entropy, nil, :nll, %{}},
    {:importance_sampling, nil, :importance_sampling, %{}},
    {:ppo, %{"clip_low_threshold" => 0.9, "clip_high_threshold" => 1.1}, :ppo,
     %{clip_low: 0.1, clip_high: 0.1}},
    {:cispo, %{"clip_high_threshold" => 1.05}, :cispo, %{low: 0.0, high: 1.05}},
    {:dro, %{"beta" => 0.5}, :dro, %{beta: 0.5}}
  ]

  setup_all do
    %{
      pool: start_pool!(load: [fixture("pathological.py")], await_ready: true),
      model: start_supervised!({Sandbox, seed: 1, load: [fixture("pathological.py")]})
    }
  end

  # Whatever the test before has left.
  setup %{model: model} do
    gradient(model)
    :ok
  end

  # What is accumulated is taken away by a step that goes nowhere.
  defp gradient(model) do
    {:ok, {bytes, _shape}} = Sandbox.parameter_gradients(model)
    {:ok, task} = Sandbox.optim_step(model, learning_rate: 0.0)
    {:ok, _} = Task.await(task, 60_000)
    for <<x::float-32-little <- bytes>>, do: x
  end

  defp await({:ok, task}), do: Task.await(task, 60_000)

  # Near its logprobs, so that some ratios are clipped and some are not.
  defp data(model) do
    tokens = [~c"to be or not to be", ~c"that is the question"]
    bare = for tokens <- tokens, do: datum(tokens, %{})
    {:ok, output} = await(Sandbox.forward(model, bare, :cross_entropy))

    for {tokens, %{"logprobs" => %{"data" => logprobs}}} <-
          Enum.zip(tokens, output.loss_fn_outputs) do
      wave = for i <- 1..length(logprobs), do: :math.sin(i)

      datum(tokens, %{
        "logprobs" => Enum.zip_with(logprobs, wave, &(&1 + 0.2 * &2)),
        "reference_logprobs" => Enum.zip_with(logprobs, wave, &(&1 - 0.5 * &2)),
        "advantages" => Enum.map(wave, &(0.3 - &1)),
        "mask" => Enum.map(wave, fn _ -> 1.0 end)
      })
    end
  end

  defp datum(tokens, inputs) do
    inputs = Map.put(inputs, "target_tokens", tl(tokens))
    %{model_input: Enum.drop(tokens, -1), loss_fn_inputs: inputs}
  end

  # Weights are what cross_entropy reads, the others none.
  defp for_loss(data, :cross_entropy) do
    for datum <- data do
      inputs = datum.loss_fn_inputs
      weights = Enum.map(inputs["advantages"], &abs/1)
      inputs = inputs |> Map.delete("mask") |> Map.put("weights", weights)
      %{datum | loss_fn_inputs: inputs}
    end
  end

  defp for_loss(data, _policy), do: data

  for {loss_fn, config, term, params} <- @losses do
    test "#{loss_fn} and regularizers have the gradient of the whole loss, without a forward pass",
         %{pool: pool, model: model} do
      data = for_loss(data(model), unquote(loss_fn))
      config = unquote(Macro.escape(config))
      opts = [regularizers: @regularizers, client_opts: [loss_fn_config: config]]

      client = {Client, {model, self()}}

      {:ok, output} =
        await(CustomLoss.forward_backward(pool, client, data, unquote(loss_fn), opts))

      native = gradient(model)

      # Two requests, the server's own with its configuration, and the linear one.
      assert_received {:forward_backward, unquote(loss_fn), [loss_fn_config: ^config]}
      assert_received {:forward_backward, :cross_entropy, []}
      refute_received _any_other

      base = %{
        fn: unquote(term),
        params: unquote(Macro.escape(params)),
        reduction: :token_sum
      }

      whole = [base_loss: base, regularizers: @regularizers]
      # The custom step has the gradient that PyTorch takes through terms and model at once.
      {:ok, check} = Sandbox.check_gradient(model, data, whole)
      assert check.max_abs_difference < 1.0e-6 * max(1.0, check.max_abs_gradient)

      {:ok, custom} =
        await(CustomLoss.forward_backward_custom(pool, {Sandbox, model}, data, whole))

      reference = gradient(model)
      largest = reference |> Enum.map(&abs/1) |> Enum.max()
      assert_in_delta largest, check.max_abs_gradient, 1.0e-6 * largest

      worst = Enum.zip_with(native, reference, &abs(&1 - &2)) |> Enum.max()
      assert worst < 1.0e-6 * largest

      # And so has its record, but for what the server alone knows.
      assert_in_delta output.metrics["loss_total"], custom.metrics["loss_total"], 1.0e-3

      for {name, term} <- output.metrics["regularizers"], key <- ["value", "grad_norm"] do
        same = custom.metrics["regularizers"][name][key]
        assert_in_delta term[key], same, 1.0e-5 * abs(same)
      end
    end
  end

  test "a term that fails leaves the server's loss, and the next step whole", %{
    pool: pool,
    model: model
  } do
    data = data(model)
    {:ok, _} = await(Sandbox.forward_backward(model, data, :ppo))
    alone = gradient(model)

    raises = [regularizers: [%{name: "bad", fn: "pathological:raises", weight: 1.0}]]
    step = &await(CustomLoss.forward_backward(pool, {Sandbox, model}, data, :ppo, &1))
    assert {:error, %TermError{term: "bad"}} = step.(raises)
    assert gradient(model) == alone
    skips = update_in(raises, [:regularizers, Access.at(0)], &Map.put(&1, :on_error, :skip))
    assert {:ok, output} = step.(skips)
    assert output.metrics["regularizers"]["bad"]["skipped"]
    assert gradient(model) == alone
  end

  test "a NaN among the server's logprobs names term, datum and token", %{
    pool: pool,
    model: model
  } do
    data = data(model)

    nan = fn output ->
      put = &List.replace_at(&1, 3, :nan)
      {:ok, update_in(output.loss_fn_outputs, &List.update_at(&1, 1, fn o -> nan(o, put) end))}
    end

    step = fn regularizers ->
      await(
        CustomLoss.forward_backward(pool, {Faulty, {model, nan}}, data, :ppo,
          regularizers: regularizers
        )
      )
    end

    assert {:error, %TermError{term: "squares"} = error} = step.(@regularizers)
    assert Exception.message(error) =~ "datum 1, token 3"
    alone = gradient(model)
    skipped = for each <- @regularizers, do: Map.put(each, :on_non_finite, :skip)
    assert {:ok, output} = step.(skipped)
    assert output.metrics["regularizers"]["kl"]["skipped"]
    # What was skipped adds nothing to the server's loss.
    assert gradient(model) == alone
  end

  defp nan(output, put), do: update_in(output["logprobs"]["data"], put)

  test "an answer without logprobs is an error that says so", %{pool: pool, model: model} do
    for {fault, sentence} <- [
          {fn output -> {:ok, %{output | loss_fn_outputs: []}} end, "data has 2 datums"},
          {fn output -> {:ok, %{output | loss_fn_outputs: [%{}, %{}]}} end, "logprobs[0]"}
        ] do
      opts = [regularizers: @regularizers]
      client = {Faulty, {model, fault}}
      step = CustomLoss.forward_backward(pool, client, data(model), :ppo, opts)
      assert {:error, %ArgumentError{} = error} = await(step)
      assert Exception.message(error) =~ sentence
    end
  end
end
