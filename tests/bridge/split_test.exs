defmodule Tinkex.CustomLoss.SplitTest do
  # The real Python: what a term divides by, and a step that is sent in several calls.
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Output, RequestError}

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

        assert output.record["base_loss"]["value"] == unquote(loss)

        assert %{"nll" => %{"value" => unquote(loss), "weight" => 0.5}} =
                 output.record["regularizers"]
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

  describe "a step in several calls" do
    # Pairs of datums, whose tokens and advantages are drawn.
    defp made_up do
      :rand.seed(:exsss, 7)
      drawn = fn count, scale -> for _ <- 1..count, do: scale * :rand.uniform() - 2.5 end

      for group <- 1..4, chosen <- [1, 0] do
        count = :rand.uniform(4)

        datum = %{
          model_input: List.duplicate(1, count),
          loss_fn_inputs: %{
            "target_tokens" => List.duplicate(0, count),
            "weights" => for(_ <- 1..count, do: Enum.random([1.0, 0.5])),
            "logprobs" => drawn.(count, 2.0),
            "advantages" => drawn.(count, 5.0),
            "reference_logprobs" => drawn.(count, 2.0),
            "group" => [group],
            "chosen" => [chosen]
          }
        }

        {datum, drawn.(count, 2.0)}
      end
    end

    defp flat(output),
      do: output |> Output.flat() |> Map.reject(fn {key, _} -> key =~ "seconds" end)

    @catalogue ~w(nll dft focal ppo cispo importance_sampling reinforce dro gspo kl proximal l2 dpo)
    @reductions [
      :token_sum,
      :token_mean,
      :sequence_mean_token_mean,
      :sequence_mean_token_sum
    ]

    for seed <- 1..5 do
      test "has the gradient of one call, by whatever terms and parts: #{seed}", %{pool: pool} do
        pairs = made_up()
        :rand.seed(:exsss, unquote(seed))
        [base | names] = Enum.take_random(@catalogue, 2 + :rand.uniform(4))

        loss = [
          base_loss: %{fn: base, reduction: Enum.random(@reductions)},
          regularizers:
            for name <- names do
              %{fn: name, weight: :rand.uniform() - 0.5, reduction: Enum.random(@reductions)}
            end
        ]

        {data, logprobs} = Enum.unzip(pairs)
        assert {:ok, whole} = CustomLoss.compute(pool, data, logprobs, loss)
        assert {:ok, totals} = CustomLoss.totals(pool, data, loss)

        # Where a term compares the datums of a group, groups stay whole: here they always do.
        parts = pairs |> Enum.chunk_every(2) |> Enum.shuffle() |> Enum.chunk_every(2)

        outputs =
          for part <- parts do
            {data, logprobs} = part |> Enum.concat() |> Enum.unzip()

            assert {:ok, output} =
                     CustomLoss.compute(pool, data, logprobs, [totals: totals] ++ loss)

            {data, output}
          end

        got =
          for {data, output} <- outputs, {datum, gradient} <- Enum.zip(data, output.gradients) do
            {datum, gradient}
          end

        norm = fn numbers -> :math.sqrt(Enum.sum(for x <- numbers, do: x * x)) end
        want = List.flatten(whole.gradients)
        ordered = List.flatten(for datum <- data, do: List.keyfind(got, datum, 0) |> elem(1))
        error = norm.(Enum.zip_with(ordered, want, &(&1 - &2)))
        assert norm.(want) > 0
        assert error <= 1.0e-6 * norm.(want)
        sum = Enum.sum(for {_data, output} <- outputs, do: output.loss_total)
        assert_in_delta sum, whole.loss_total, 1.0e-5 * (1 + abs(whole.loss_total))

        # Their records merge to that of the whole, but for the time it took.
        merged = flat(CustomLoss.merge(for {_data, output} <- outputs, do: output))
        assert Map.keys(merged) == Map.keys(flat(whole))

        for {key, value} <- flat(whole),
            do: assert_in_delta(merged[key], value, 1.0e-5 * (1 + abs(value)), key)

        # Totals of parts are those of the whole.
        each =
          for {data, _output} <- outputs do
            assert {:ok, totals} = CustomLoss.totals(pool, data, loss)
            totals
          end

        added = Enum.reduce(each, &CustomLoss.add_totals/2)
        assert Map.keys(added) == Map.keys(totals)

        for {name, entry} <- totals do
          assert_in_delta added[name]["tokens"], entry["tokens"], 1.0e-4
          assert Map.delete(added[name], "tokens") == Map.delete(entry, "tokens")
        end
      end
    end

    test "is refused where a term looks at the whole batch, or a group is torn", %{pool: pool} do
      {data, logprobs} = Enum.unzip(made_up())

      for {loss, sentence} <- [
            {[base_loss: "pathological:squares"], "the base loss may look at the whole batch"},
            {[regularizers: [%{fn: "dpo", weight: 1.0}]], "of group 2 this call has 1"}
          ] do
        assert {:ok, totals} = CustomLoss.totals(pool, data, loss)
        loss = [totals: totals] ++ loss

        assert {:error, %RequestError{path: "totals"} = error} =
                 CustomLoss.compute(pool, Enum.take(data, 3), Enum.take(logprobs, 3), loss)

        assert Exception.message(error) =~ sentence

        # A client that may not be asked for anything.
        assert {:ok, task} =
                 CustomLoss.forward_backward_custom(
                   pool,
                   {__MODULE__.NoClient, :none},
                   Enum.take(data, 3),
                   loss
                 )

        assert Task.await(task) == {:error, error}
      end
    end

    test "cannot have the totals of other terms, or what are none", %{pool: pool} do
      {data, _logprobs} = Enum.unzip(made_up())
      {:ok, nll} = CustomLoss.totals(pool, data, base_loss: :nll)
      {:ok, kl} = CustomLoss.totals(pool, data, regularizers: [%{fn: :kl, weight: 1}])

      assert_raise ArgumentError, ~r/of different terms/, fn ->
        CustomLoss.add_totals(nll, kl)
      end

      assert_raise ArgumentError, ~r/invalid value for :totals .*in its {:ok, totals}/, fn ->
        CustomLoss.compute(pool, data, [], base_loss: :nll, totals: {:ok, nll})
      end
    end
  end

  defmodule NoClient do
    def forward(_ref, _data, _loss_fn, _opts), do: raise("sent")
    def forward_backward(_ref, _data, _loss_fn, _opts), do: raise("sent")
  end
end
