defmodule Tinkex.CustomLoss.Terms do
  @moduledoc false

  alias Tinkex.CustomLoss.{RequestError, Schema}

  # What can be named: how a name is written in Elixir, and which names there are.

  @base_loss [
    fn: [type: :term, required: true, doc: "what computes it."],
    params: [type: :params, default: %{}, doc: "keyword arguments of the function."],
    reduction: Schema.reduction()
  ]

  @doc """
  The base loss of a call: from a name, `{name, params}`, or a map or keyword list with `:fn`,
  `:params` and `:reduction`, which may be strings.
  """
  def base_loss!(nil), do: nil
  def base_loss!({fun, params}), do: base_loss!(fn: fun, params: params)

  def base_loss!([_ | _] = given), do: base_loss_map!(given)
  def base_loss!(%{} = given), do: base_loss_map!(given)
  def base_loss!(fun) when is_atom(fun) or is_binary(fun), do: base_loss!(fn: fun)

  def base_loss!(other) do
    raise ArgumentError,
          "expected :base_loss to be a term's name, {name, params} or %{fn: name, params: params}, " <>
            "got: #{inspect(other)}"
  end

  defp base_loss_map!(given),
    do: Schema.validate_map!(given, @base_loss, ":base_loss", "the base loss")

  @doc """
  Says which of a request's terms the pool does not have: `{:error, RequestError}`.

  Not for the caller to raise: what there is depends on the pool and what it has loaded, which the
  caller need not know, and which may change while the caller runs.
  """
  def check(%{base_loss: base_loss, regularizers: regularizers}, known) do
    base = if base_loss, do: [{"the base loss", "base_loss.fn", base_loss.fn}], else: []

    named =
      Enum.with_index(regularizers, fn regularizer, index ->
        {"regularizer #{inspect(regularizer.name)}", "regularizers[#{index}].fn", regularizer.fn}
      end)

    case Enum.find(base ++ named, fn {_who, _path, fun} -> not is_map_key(known, fun) end) do
      nil -> :ok
      {who, path, fun} -> {:error, unknown(who, path, fun, Map.keys(known))}
    end
  end

  defp unknown(who, path, fun, known) do
    nearest = known |> Enum.sort_by(&{-String.jaro_distance(&1, fun), &1}) |> Enum.map(&written/1)

    %RequestError{
      path: path,
      reason:
        "there is no term #{written(fun)} for #{who}; #{listed(nearest)}. " <>
          "Functions of your own come from the modules and files in :load, which the pool is " <>
          "started with"
    }
  end

  # Of many only the nearest, as in Python.
  defp listed(nearest) when length(nearest) > 12,
    do: "of #{length(nearest)}, the nearest are #{nearest |> Enum.take(3) |> Enum.join(", ")}"

  defp listed(nearest), do: "there are #{Enum.join(nearest, ", ")}"

  defp written(name), do: if(name =~ ":", do: inspect(name), else: ":#{name}")
end
