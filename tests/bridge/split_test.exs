defmodule Tinkex.CustomLoss.SplitTest do
  # The real Python: what a term divides by, and a step that is sent in several calls.
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.RequestError

  setup_all do
    %{pool: start_pool!(load: [fixture("pathological.py")], await_ready: true)}
  end

  describe "a reduction" do
    @logprobs [[-1.0, -2.0], [-3.0]]
    @losses %{
      "token_sum" => 6.0,
      "token_mean" => 2.0,
      "sequence_mean_token_mean" => 2.25,
      "sequence_mean_token_sum" => 3.0
    }

    for {reduction, loss} <- @losses do
      test "of #{reduction} is that of the base loss and of a regularizer", %{pool: pool} do
        named = %{fn: "nll", reduction: unquote(String.to_atom(reduction))}

        assert {:ok, output} =
                 CustomLoss.compute(pool, nil, @logprobs,
                   base_loss: named,
                   regularizers: [Map.put(named, :weight, 0.5)]
                 )

        assert output.telemetry["base_loss"]["value"] == unquote(loss)

        assert %{"nll" => %{"value" => unquote(loss), "weight" => 0.5}} =
                 output.telemetry["regularizers"]
      end
    end

    test "is no option of a function that does its own", %{pool: pool} do
      term = %{fn: "pathological:squares", reduction: :token_mean}

      for {opts, path} <- [
            {[base_loss: term], "base_loss.reduction"},
            {[regularizers: [Map.put(term, :weight, 1)]], "regularizers[0].reduction"}
          ] do
        assert {:error, %RequestError{path: ^path} = error} =
                 CustomLoss.compute(pool, nil, @logprobs, opts)

        assert Exception.message(error) =~ "has a reduction, but its function does its own"
      end
    end

    test "is said once", %{pool: pool} do
      base = %{fn: :nll, params: %{reduction: :token_sum}, reduction: :token_mean}

      assert {:error, %RequestError{} = error} =
               CustomLoss.compute(pool, nil, @logprobs, base_loss: base)

      assert Exception.message(error) =~ "the base loss has two reductions"
    end
  end
end
