defmodule Tinkex.CustomLoss.ReferenceTest do
  # The page of the site with the Elixir modules.
  use ExUnit.Case, async: true

  Code.require_file("../../scripts/elixir_reference.exs", __DIR__)

  test "has every public module, function and option, and nothing that is hidden" do
    page = apply(ElixirReference, :page, [])
    headings = for [_, heading] <- Regex.scan(~r/^#+ (.+)$/m, page), do: heading

    for module <- [
          Tinkex.CustomLoss,
          Tinkex.CustomLoss.Live,
          Tinkex.CustomLoss.Sandbox,
          Tinkex.CustomLoss.TermError,
          Tinkex.CustomLoss.Wire.Tensor
        ],
        do: assert(inspect(module) in headings)

    for {name, arity} <- Tinkex.CustomLoss.__info__(:functions),
        docs = elem(Code.fetch_docs(Tinkex.CustomLoss), 6),
        {{:function, ^name, ^arity}, _, _, %{"en" => doc}, _} <- docs do
      assert Enum.any?(headings, &(&1 =~ ~r/^#{Regex.escape("#{name}")}\/(\d+\.\.)?#{arity}$/))
      assert page =~ doc |> String.split("\n") |> hd()
    end

    assert page =~ "  * `:max_queue` - requests that may wait"
    assert page =~ "@spec compute("
    assert "mix tinkex.custom_loss.doctor" in headings
    refute page =~ "Tinkex.CustomLoss.Pool.Worker\n"
    refute "Tinkex.CustomLoss.Options" in headings
  end
end
