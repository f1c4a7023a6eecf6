defmodule Tinkex.CustomLoss.FuzzTest do
  # The short form of make fuzz.
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss.Test.Fuzz

  test "mutated and random frames are messages or errors" do
    seen = Fuzz.run(20_000, 5)
    assert Enum.sum(Map.values(seen)) == 20_000
    assert seen |> Map.keys() |> Enum.sort() == [:error, :invalid, :log, :ready, :result]
  end
end
