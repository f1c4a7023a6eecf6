defmodule Tinkex.CustomLoss.Split do
  @moduledoc false
  # Steps that are sent in several calls, in plain values: what needs no Python.

  @doc "See `Tinkex.CustomLoss.add_totals/2`."
  def add_totals(first, second) do
    scopes = fn totals -> Map.new(totals, fn {name, entry} -> {name, entry["scope"]} end) end

    if scopes.(first) != scopes.(second) do
      raise ArgumentError,
            "these totals are of different terms, and cannot be added: " <>
              "#{inspect(scopes.(first))} and #{inspect(scopes.(second))}"
    end

    Map.merge(first, second, fn _name, entry, other -> Map.merge(entry, other, &added/3) end)
  end

  defp added("scope", scope, scope), do: scope
  defp added("groups", groups, others), do: Map.merge(groups, others, fn _, a, b -> a + b end)
  defp added(_count, a, b), do: a + b
end
