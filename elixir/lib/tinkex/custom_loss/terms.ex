defmodule Tinkex.CustomLoss.Terms do
  @moduledoc false
  # What can be named: how a name is written in Elixir, and which names there are.

  @doc "The name of the wire: `:l2` is `\"l2\"`."
  def name(fun) when is_atom(fun), do: Atom.to_string(fun)
  def name(fun) when is_binary(fun), do: fun

  @doc "What was expected instead of `fun`, or nil if it can be a name."
  def problem(fun) do
    unless (is_atom(fun) and fun not in [nil, true, false]) or
             (is_binary(fun) and fun != "" and String.valid?(fun)),
           do: ~s(the atom of a built-in term, such as :l2, or "module:function")
  end

  @doc """
  The base loss of a call, from a name, `{name, params}`, or a map with `:fn` and `:params`.
  """
  def base_loss!(nil), do: nil
  def base_loss!({fun, params}), do: base_loss!(%{fn: fun, params: params})

  def base_loss!(%{fn: fun} = given) when not is_struct(given) do
    params = Map.get(given, :params, %{})

    with [key | _] <- Map.keys(given) -- [:fn, :params] do
      raise ArgumentError, "the base loss has no option #{inspect(key)}; it has :fn and :params"
    end

    with expected when is_binary(expected) <- problem(fun) do
      raise ArgumentError,
            "invalid value for :fn of the base loss: expected #{expected}, got: #{inspect(fun)}"
    end

    unless (is_map(params) and not is_struct(params)) or Keyword.keyword?(params) do
      raise ArgumentError,
            "invalid value for :params of the base loss: expected a map or keyword list, " <>
              "got: #{inspect(params)}"
    end

    %{fn: name(fun), params: Map.new(params)}
  end

  def base_loss!(fun) when is_atom(fun) or is_binary(fun), do: base_loss!(%{fn: fun})

  def base_loss!(other) do
    raise ArgumentError,
          "expected :base_loss to be a term's name, {name, params} or %{fn: name, params: params}, " <>
            "got: #{inspect(other)}"
  end

  @doc """
  Says which of a request's terms the pool does not have: `{:error, ArgumentError}`.
  """
  def check(%{base_loss: base_loss, regularizers: regularizers}, known) do
    base = if base_loss, do: [{"the base loss", base_loss.fn}], else: []
    named = Enum.map(regularizers, &{"regularizer #{inspect(&1.name)}", &1.fn})

    case Enum.find(base ++ named, fn {_who, fun} -> not is_map_key(known, fun) end) do
      nil -> :ok
      {who, fun} -> {:error, unknown(who, fun, Map.keys(known))}
    end
  end

  defp unknown(who, fun, known) do
    nearest = known |> Enum.sort_by(&{-String.jaro_distance(&1, fun), &1}) |> Enum.map(&written/1)

    %ArgumentError{
      message:
        "there is no term #{written(fun)} for #{who}; there are #{Enum.join(nearest, ", ")}. " <>
          "Functions of your own come from the modules and files in :load, which the pool is " <>
          "started with"
    }
  end

  defp written(name), do: if(name =~ ":", do: inspect(name), else: ":#{name}")
end
