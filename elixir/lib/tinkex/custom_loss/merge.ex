defmodule Tinkex.CustomLoss.Merge do
  @moduledoc false
  # The record of a step that was computed in parts: `merge` of record.py, on plain maps. The vectors
  # of tests/vectors/merge.json hold for both.

  alias Tinkex.CustomLoss.Output

  @sums ["loss_total", "regularizer_total", "logprob_count", "datum_count", "compute_seconds"]

  @doc "See `Tinkex.CustomLoss.merge/1`."
  def merge([_ | _] = parts) do
    records = Enum.map(parts, &record!/1)
    check!(records)
    sums = Map.new(@sums, &{&1, sum(records, &1)})
    totals = Enum.map(records, & &1["total_grad_norm"])
    step = %{size: sums["logprob_count"], totals: totals, total: norm(totals)}
    cosines = Enum.map(records, & &1["cosines"])

    base_losses = for %{"base_loss" => %{} = base_loss} <- records, do: base_loss
    names = records |> hd() |> Map.fetch!("regularizers") |> Map.keys()

    Map.merge(sums, %{
      "base_loss" => if(base_losses != [], do: term(base_losses, step)),
      "regularizers" =>
        Map.new(
          names,
          &{&1, records |> Enum.map(fn r -> r["regularizers"][&1] end) |> term(step)}
        ),
      "total_grad_norm" => step.total,
      "total_grad_rms" => root_mean_square(step.total, step.size),
      "cosines" => if(nil not in cosines, do: pairs(cosines, records)),
      "schedule_step" => same(Enum.map(records, & &1["schedule_step"]))
    })
  end

  def merge(other) do
    raise ArgumentError,
          "merge/1 needs a list of outputs or of their records, with one at least, got: " <>
            inspect(other)
  end

  defp record!(%Output{record: record}), do: record
  defp record!(%{"loss_total" => _, "regularizers" => %{}} = record), do: record

  defp record!(other) do
    raise ArgumentError,
          "merge/1 needs outputs or nested records (the metrics of a step, not in flat form), got: " <>
            inspect(other)
  end

  defp check!([first | _] = records) do
    for {record, index} <- Enum.with_index(records), terms(record) != terms(first) do
      raise ArgumentError,
            "record #{index} is not of the same step as record 0: its terms and their weights are " <>
              "#{inspect(terms(record))}, those of record 0 #{inspect(terms(first))}; give every " <>
              "part of a step the same terms and the same :step"
    end
  end

  defp terms(record) do
    weights = Map.new(record["regularizers"], fn {name, term} -> {name, term["weight"]} end)
    if record["base_loss"], do: Map.put(weights, "base_loss", 1.0), else: weights
  end

  # A base loss or a regularizer: the one has fewer keys than the other.
  defp term([first | _] = parts, step) do
    norms = Enum.map(parts, & &1["grad_norm"])
    norm = norm(norms)
    weight = first["weight"]

    merged = %{
      "value" => sum(parts, "value"),
      "weight" => weight,
      "contribution" => sum(parts, "contribution"),
      "grad_norm" => norm,
      "grad_norm_weighted" => times(norm, weight),
      "grad_rms" => root_mean_square(norm, step.size),
      "cosine_to_total" => cosine(parts, norms, norm, step),
      "differentiable" => any?(parts, "differentiable"),
      "zero_gradient" => zero?(parts, norm),
      "seconds" => sum(parts, "seconds"),
      "skipped" => any?(parts, "skipped"),
      "error" => Enum.find_value(parts, & &1["error"]),
      "non_finite_zeroed" => sum(parts, "non_finite_zeroed"),
      "custom" => custom(Enum.map(parts, & &1["custom"]))
    }

    Map.take(merged, Map.keys(first))
  end

  defp any?(parts, key), do: Enum.any?(parts, & &1[key])

  # A part that had no tokens says nothing; one that was skipped or zeroed is not known to be.
  defp zero?(_parts, nil), do: nil

  defp zero?(parts, norm) do
    spoiled = Enum.any?(parts, &(&1["skipped"] || &1["non_finite_zeroed"] > 0))
    norm == 0 and not spoiled and any?(parts, "zero_gradient")
  end

  # Σ cos·|g|·|G| / (|g|·|G|) over the parts; divided first, so that nothing overflows.
  defp cosine(parts, norms, norm, step),
    do: parts |> Enum.map(& &1["cosine_to_total"]) |> whole(norms, norm, step)

  # Of each pair of terms.
  defp pairs([first | _] = parts, records) do
    for {a, others} <- first, into: %{} do
      norms = norms(records, a)

      {a,
       for {b, _cosine} <- others, into: %{} do
         totals = norms(records, b)
         against = %{totals: totals, total: norm(totals)}
         {b, whole(Enum.map(parts, & &1[a][b]), norms, norm(norms), against) || 0.0}
       end}
    end
  end

  defp norms(records, "base_loss"), do: Enum.map(records, & &1["base_loss"]["grad_norm"])
  defp norms(records, name), do: Enum.map(records, & &1["regularizers"][name]["grad_norm"])

  defp whole(cosines, norms, norm, step) do
    cond do
      not Enum.all?([norm, step.total | cosines], &is_number/1) -> nil
      norm == 0 or step.total == 0 -> 0.0
      true -> cosines |> dot(norms, norm, step) |> max(-1.0) |> min(1.0)
    end
  end

  defp dot(cosines, norms, norm, step) do
    [cosines, norms, step.totals]
    |> Enum.zip_with(fn [cosine, own, total] -> cosine * (own / norm) * (total / step.total) end)
    |> Enum.sum()
  end

  # Metrics are reduced as the values are, so they add up; one that a part lacks is 0 there.
  defp custom(parts) do
    names = parts |> Enum.flat_map(&Map.keys/1) |> Enum.uniq()
    Map.new(names, fn name -> {name, parts |> Enum.map(&Map.get(&1, name, 0.0)) |> sum()} end)
  end

  defp same([first | others]), do: if(Enum.all?(others, &(&1 == first)), do: first)

  defp sum(parts, key), do: parts |> Enum.map(& &1[key]) |> sum()

  # Floats of Erlang are finite, so what is not is an atom.
  defp sum(values) do
    cond do
      nil in values -> nil
      :nan in values or (:infinity in values and :neg_infinity in values) -> :nan
      :infinity in values -> :infinity
      :neg_infinity in values -> :neg_infinity
      true -> finite_sum(values)
    end
  end

  defp finite_sum(values) do
    Enum.sum(values)
  rescue
    # It is too large for a float; which way, half of each still says.
    ArithmeticError ->
      if values |> Enum.map(&(&1 / length(values))) |> Enum.sum() > 0,
        do: :infinity,
        else: :neg_infinity
  end

  # √Σ norm², scaled so that no square overflows.
  defp norm(norms) do
    cond do
      nil in norms -> nil
      :infinity in norms -> :infinity
      :nan in norms -> :nan
      true -> finite_norm(norms, Enum.max(norms))
    end
  end

  defp finite_norm(_norms, largest) when largest == 0, do: 0.0

  defp finite_norm(norms, largest),
    do:
      times(largest, norms |> Enum.map(&(&1 / largest)) |> Enum.map(&(&1 * &1)) |> root_of_sum())

  defp root_of_sum(squares), do: squares |> Enum.sum() |> :math.sqrt()

  defp root_mean_square(norm, _size) when not is_number(norm), do: norm
  defp root_mean_square(_norm, 0), do: 0.0
  defp root_mean_square(norm, size), do: norm / :math.sqrt(size)

  # |weight| · norm. A base loss has no weight, and so none of this.
  defp times(norm, weight) when is_number(norm) and is_number(weight) do
    norm * abs(weight)
  rescue
    ArithmeticError -> :infinity
  end

  defp times(:infinity, weight) when weight == 0, do: :nan
  defp times(norm, _weight), do: norm
end
