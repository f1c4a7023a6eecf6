defmodule Tinkex.CustomLoss.TrainingTest do
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.TermError

  defmodule Output do
    # Of the shape of Tinkex.Types.ForwardBackwardOutput.
    defstruct [:loss_fn_output_type, loss_fn_outputs: [], metrics: %{}]
  end

  defmodule Client do
    # The functions of Tinkex.TrainingClient that a step calls, over a recorded server: its logprobs
    # are fixed, and its loss is the cross-entropy Σ -logprob · weight.

    @logprobs [[-1.0, -2.0], [-3.0]]

    def start_link(opts \\ []),
      do: Agent.start_link(fn -> %{calls: [], options: [], opts: opts} end)

    def calls(client), do: client |> Agent.get(& &1.calls) |> Enum.reverse()
    def options(client), do: client |> Agent.get(& &1.options) |> Enum.reverse()

    def forward(client, data, loss_fn, opts), do: run(client, :forward, data, loss_fn, opts)

    def forward_backward(client, data, loss_fn, opts),
      do: run(client, :forward_backward, data, loss_fn, opts)

    defp run(client, function, data, :cross_entropy, opts) do
      {:ok,
       Task.async(fn ->
         Agent.get_and_update(client, fn state ->
           answer = Keyword.get(state.opts, function) || {:ok, answer(data)}
           calls = [{function, data} | state.calls]
           {answer, %{state | calls: calls, options: [opts | state.options]}}
         end)
       end)}
    end

    defp answer(data) do
      weights = for datum <- data, do: datum.loss_fn_inputs["weights"]

      losses =
        for {logprobs, weights} <- Enum.zip(@logprobs, weights),
            {logprob, weight} <- Enum.zip(logprobs, weights),
            do: -logprob * weight

      %Output{
        loss_fn_output_type: "ArrayRecord",
        loss_fn_outputs:
          for(
            lp <- @logprobs,
            do: %{"logprobs" => %{"data" => lp, "dtype" => "float32", "shape" => [length(lp)]}}
          ),
        metrics: %{"loss:sum" => Enum.sum(losses), "tokens:sum" => 3.0}
      }
    end
  end

  setup_all do
    %{pool: start_pool!(load: [fixture("pathological.py")], await_ready: true)}
  end

  @data [
    %{
      model_input: [1, 2],
      loss_fn_inputs: %{
        "target_tokens" => [2, 3],
        "weights" => [1.0, 1.0],
        "reference_logprobs" => [-1.0, -1.0]
      }
    },
    %{
      model_input: [4],
      loss_fn_inputs: %{
        "target_tokens" => [5],
        "weights" => [1.0],
        "reference_logprobs" => [-3.0]
      }
    }
  ]

  @loss [base_loss: "pathological:squares"]

  defp step(pool, client, opts) do
    {:ok, task} = CustomLoss.forward_backward_custom(pool, {Client, client}, @data, opts)
    Task.await(task, 30_000)
  end

  test "a step is forward, loss and gradient, backward with weights = -gradient", %{pool: pool} do
    {:ok, client} = Client.start_link()
    assert {:ok, %Output{} = output} = step(pool, client, @loss)
    assert [{:forward, forward}, {:forward_backward, backward}] = Client.calls(client)

    # d Σ x² = 2x at -1, -2, -3
    assert Enum.map(backward, & &1.loss_fn_inputs["weights"]) == [[2.0, 4.0], [6.0]]
    assert Enum.map(backward, & &1.loss_fn_inputs["target_tokens"]) == [[2, 3], [5]]
    assert Enum.map(backward, & &1.model_input) == [[1, 2], [4]]

    # What only terms look at is not sent.
    for datum <- forward ++ backward,
        do: assert(Enum.sort(Map.keys(datum.loss_fn_inputs)) == ["target_tokens", "weights"])

    assert %{"loss:sum" => 14.0, "surrogate_loss:sum" => 28.0, "tokens:sum" => 3.0} =
             output.metrics

    assert output.metrics["base_loss"]["value"] == 14.0
  end

  test "the record may be flat", %{pool: pool} do
    {:ok, client} = Client.start_link()
    assert {:ok, output} = step(pool, client, [metrics: :flat] ++ @loss)
    assert output.metrics["base_loss/value"] == 14.0
    assert Enum.all?(output.metrics, fn {_name, value} -> is_float(value) end)
  end

  test "nothing goes backward when a term fails", %{pool: pool} do
    {:ok, client} = Client.start_link()

    assert {:error, %TermError{term: "base_loss"}} =
             step(pool, client, base_loss: "pathological:raises")

    assert [{:forward, _}] = Client.calls(client)
    assert {:ok, _output} = step(pool, client, @loss)
  end

  test "the client's own errors come as they are", %{pool: pool} do
    error = %{__struct__: Tinkex.Error, message: "rate limited", type: :api_status}
    {:ok, client} = Client.start_link(forward: {:error, error})
    assert step(pool, client, @loss) == {:error, error}
    {:ok, client} = Client.start_link(forward_backward: {:error, error})
    assert step(pool, client, @loss) == {:error, error}
  end

  test "a count that does not fit is an error, not a crash", %{pool: pool} do
    {:ok, client} = Client.start_link(forward: {:ok, %Output{loss_fn_outputs: []}})
    assert {:error, %ArgumentError{} = error} = step(pool, client, @loss)
    assert Exception.message(error) =~ "data has 2 datums"
  end

  describe "a loss of the server's own" do
    @regularizers [regularizers: [%{name: "squares", fn: "pathological:squares", weight: 0.5}]]

    defp native(pool, client, loss_fn, opts) do
      {:ok, task} = CustomLoss.forward_backward(pool, {Client, client}, @data, loss_fn, opts)
      Task.await(task, 30_000)
    end

    test "is sent as it is, and the regularizers' gradient after it", %{pool: pool} do
      {:ok, client} = Client.start_link()
      config = [client_opts: [loss_fn_config: %{"a" => 1.0}]]

      assert {:ok, %Output{} = output} =
               native(pool, client, :cross_entropy, config ++ @regularizers)

      assert [{:forward_backward, base}, {:forward_backward, linear}] = Client.calls(client)
      assert Client.options(client) == [[loss_fn_config: %{"a" => 1.0}], []]

      for datum <- base,
          do: assert(Map.keys(datum.loss_fn_inputs) == ["target_tokens", "weights"])

      assert Enum.map(base, & &1.loss_fn_inputs["weights"]) == [[1.0, 1.0], [1.0]]
      # 0.5 · d Σ x² = x at -1, -2, -3
      assert Enum.map(linear, & &1.loss_fn_inputs["weights"]) == [[1.0, 2.0], [3.0]]

      assert %{"loss:sum" => 6.0, "tokens:sum" => 3.0, "surrogate_loss:sum" => 14.0} =
               output.metrics

      assert %{"loss_total" => 13.0, "regularizer_total" => 7.0, "total_grad_norm" => nil} =
               output.metrics

      assert output.metrics["base_loss"]["value"] == 6.0
      assert output.metrics["regularizers"]["squares"]["cosine_to_total"] == nil
      assert [%{"logprobs" => %{"data" => [-1.0, -2.0]}}, _] = output.loss_fn_outputs
    end

    test "is accumulated when a term fails", %{pool: pool} do
      {:ok, client} = Client.start_link()
      raises = [regularizers: [%{name: "bad", fn: "pathological:raises", weight: 1.0}]]
      assert {:error, %TermError{term: "bad"}} = native(pool, client, :cross_entropy, raises)
      assert [{:forward_backward, _}] = Client.calls(client)
    end

    test "goes alone where the regularizers add nothing", %{pool: pool} do
      {:ok, client} = Client.start_link()
      none = [regularizers: [%{name: "squares", fn: "pathological:squares", weight: 0.0}]]
      assert {:ok, output} = native(pool, client, :cross_entropy, [metrics: :flat] ++ none)
      assert [{:forward_backward, _}] = Client.calls(client)
      assert output.metrics["regularizers/squares/value"] == 14.0
      assert output.metrics["loss_total"] == output.metrics["loss:sum"]
    end

    test "its errors come as they are, and what is no loss is refused", %{pool: pool} do
      error = %{__struct__: Tinkex.Error, message: "rate limited", type: :api_status}
      {:ok, client} = Client.start_link(forward_backward: {:error, error})
      assert native(pool, client, :cross_entropy, @regularizers) == {:error, error}

      for {loss_fn, opts, sentence} <- [
            {3, @regularizers, "name of a loss of the server's"},
            {:ppo, [], "call the training client's own forward_backward/4"},
            {:ppo, [base_loss: :nll] ++ @regularizers, "base_loss"}
          ] do
        assert_raise ArgumentError, ~r/#{sentence}/, fn ->
          native(pool, client, loss_fn, opts)
        end
      end
    end
  end

  test "what is no client, no data, or no gradient is refused", %{pool: pool} do
    refused = fn client, data, opts ->
      Exception.message(
        assert_raise(ArgumentError, fn ->
          CustomLoss.forward_backward_custom(pool, client, data, opts)
        end)
      )
    end

    assert refused.({String, :ref}, @data, @loss) =~
             "String is no training client: it lacks forward/4"

    assert refused.("client", @data, @loss) =~
             "expected a Tinkex training client or {module, ref}"

    assert refused.({Client, self()}, [], @loss) =~ "expected data to be a list of datums"
    assert refused.({Client, self()}, @data, [gradients: false] ++ @loss) =~ "call compute/4"

    unless Code.ensure_loaded?(Tinkex.TrainingClient),
      do: assert(refused.(self(), @data, @loss) =~ "add :tinkex to your dependencies")
  end
end
