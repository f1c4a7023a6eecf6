defmodule Tinkex.CustomLoss.MergeTest do
  # The record of a step from those of its parts. Python reads the same vectors.
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.Output
  alias Tinkex.CustomLoss.Test.Vectors

  for %{name: name} = vector <- Vectors.merges() do
    @vector vector

    if vector.merged do
      test name do
        assert same?(CustomLoss.merge(@vector.records), @vector.merged),
               inspect(CustomLoss.merge(@vector.records), limit: :infinity)
      end
    else
      test name do
        assert_raise ArgumentError, fn -> CustomLoss.merge(@vector.records) end
      end
    end
  end

  test "outputs and the nested metrics of a step serve as their records do" do
    [vector | _] = Vectors.merges()
    [first, second] = vector.records
    output = %Output{loss_total: first["loss_total"], gradients: nil, record: first}
    metrics = Map.merge(second, %{"loss:sum" => 1.0, "tokens" => 3.0})
    assert CustomLoss.merge([output, metrics]) == CustomLoss.merge([first, second])
  end

  test "what is refused says which part it is, and what to do" do
    [%{records: [first, second]} | _] = Vectors.merges()
    other = put_in(second["regularizers"]["kl"]["weight"], 0.2)

    for {parts, sentence} <- [
          {[first, other], ~r/record 1 is not of the same step as record 0: .*the same :step/},
          {[], ~r/with one at least/},
          {first, ~r/a list of outputs/},
          {[Output.flat(first)], ~r/not in flat form/}
        ] do
      assert_raise ArgumentError, sentence, fn -> CustomLoss.merge(parts) end
    end
  end

  # Floats to ten digits, and everything else exactly.
  defp same?(got, want) when is_float(got) and is_float(want),
    do: abs(got - want) <= 1.0e-10 * abs(want)

  defp same?(%{} = got, %{} = want) do
    Map.keys(got) == Map.keys(want) and
      Enum.all?(want, fn {key, value} -> same?(got[key], value) end)
  end

  defp same?(got, want), do: got === want
end
