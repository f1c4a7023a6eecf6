defmodule Tinkex.CustomLoss.Regularizer do
  @moduledoc """
  A named, weighted term of the loss: `loss_total = base_loss + Σ weight · loss`.

  Wherever regularizers are taken, so are maps and keyword lists with these keys:

    * `:name` - unique within the call, not empty; it names the term in telemetry and errors.
      Required.
    * `:fn` - what computes it: `:l2`, or any other built-in term, or `"my_losses:topology"`, a
      function of a module that the pool was started with (`:load`). Required. See
      `Tinkex.CustomLoss.terms/1` for what there is.
    * `:weight` - a finite number of either sign. Required.
    * `:params` - a map or keyword list: keyword arguments of the function.
    * `:run_in_executor` - `true`: in a thread, so that a slow term does not keep the others
      waiting. `:process`: in another process, from which a timeout can really end it. Defaults to
      `false`.
    * `:timeout` - milliseconds for this term. Without one, a term that hangs takes the whole call's
      deadline, and its worker, with it.
    * `:on_error` - `:raise` (default) fails the call with a `Tinkex.CustomLoss.TermError`; `:skip`
      leaves the term out and says so in telemetry.
    * `:on_non_finite` - when its loss or gradient is nan or infinite: `:raise` (default), `:skip`
      the term, or `:zero` the entries.
    * `:enabled` - `false` leaves it out. Defaults to `true`.
  """

  alias Tinkex.CustomLoss.Terms

  @enforce_keys [:name, :fn, :weight]
  defstruct [
    :name,
    :fn,
    :weight,
    params: %{},
    run_in_executor: false,
    timeout: nil,
    on_error: :raise,
    on_non_finite: :raise,
    enabled: true
  ]

  @type t :: %__MODULE__{
          name: String.t(),
          fn: String.t(),
          weight: number(),
          params: %{(atom() | String.t()) => term()},
          run_in_executor: boolean() | :process,
          timeout: pos_integer() | nil,
          on_error: :raise | :skip,
          on_non_finite: :raise | :skip | :zero,
          enabled: boolean()
        }

  @keys [
    :name,
    :fn,
    :weight,
    :params,
    :run_in_executor,
    :timeout,
    :on_error,
    :on_non_finite,
    :enabled
  ]

  @doc """
  A regularizer from a map, keyword list or struct.

  Raises `ArgumentError` that names the regularizer, the key, and what is allowed:

      iex> Tinkex.CustomLoss.Regularizer.new!(name: "kl", fn: :kl, weight: :heavy)
      ** (ArgumentError) invalid value for :weight of regularizer "kl": expected a finite number, got: :heavy
  """
  @spec new!(t() | map() | keyword()) :: t()
  def new!(%__MODULE__{} = regularizer), do: regularizer |> Map.from_struct() |> new!()

  def new!(given) do
    map = to_map!(given)
    label = label(map)

    with [key | _] <- Enum.reject([:name, :fn, :weight], &is_map_key(map, &1)) do
      raise ArgumentError, "#{label} lacks :#{key}; it needs :name, :fn and :weight"
    end

    for {key, value} <- map, sentence = problem(key, value) do
      raise ArgumentError,
            "invalid value for :#{key} of #{label}: expected #{sentence}, got: #{inspect(value)}"
    end

    struct!(__MODULE__, %{map | fn: Terms.name(map.fn)} |> Map.update(:params, %{}, &Map.new/1))
  end

  @doc """
  Regularizers from a list, whose names must differ.
  """
  @spec list!([t() | map() | keyword()]) :: [t()]
  def list!(given) when is_list(given) do
    if given != [] and Keyword.keyword?(given),
      do: raise(ArgumentError, "expected :regularizers to be a list of regularizers, got one")

    regularizers = Enum.map(given, &new!/1)
    names = Enum.map(regularizers, & &1.name)

    with [name | _] <- names -- Enum.uniq(names) do
      raise ArgumentError,
            "two regularizers are named #{inspect(name)}; names tell them apart in telemetry"
    end

    regularizers
  end

  def list!(other),
    do: raise(ArgumentError, "expected :regularizers to be a list, got: #{inspect(other)}")

  @doc false
  # What the protocol says of a regularizer, which counts in seconds.
  def to_wire(%__MODULE__{} = regularizer) do
    regularizer
    |> Map.from_struct()
    |> Map.update!(:timeout, &(&1 && &1 / 1000))
  end

  defp to_map!(given) when is_list(given) or (is_map(given) and not is_struct(given)) do
    Map.new(given, fn pair ->
      with {key, value} <- pair, {:ok, key} <- key(key) do
        {key, value}
      else
        _ ->
          raise ArgumentError,
                "a regularizer has no option #{inspect(pair)}; its options are #{inspect(@keys)}"
      end
    end)
  end

  defp to_map!(other) do
    raise ArgumentError,
          "expected a regularizer to be a map or keyword list with :name, :fn and :weight, " <>
            "got: #{inspect(other)}"
  end

  for key <- @keys do
    defp key(unquote(key)), do: {:ok, unquote(key)}
    defp key(unquote(Atom.to_string(key))), do: {:ok, unquote(key)}
  end

  defp key(_other), do: :error

  defp label(%{name: name}) when is_binary(name), do: "regularizer #{inspect(name)}"
  defp label(_unnamed), do: "a regularizer"

  defp problem(:name, name) do
    unless is_binary(name) and String.valid?(name) and String.trim(name) != "",
      do: "a string that is not empty"
  end

  defp problem(:fn, fun), do: Terms.problem(fun)
  defp problem(:weight, weight), do: unless(is_number(weight), do: "a finite number")

  defp problem(:params, params) do
    unless (is_map(params) and not is_struct(params)) or Keyword.keyword?(params),
      do: "a map or keyword list"
  end

  defp problem(:timeout, timeout) do
    unless is_nil(timeout) or (is_integer(timeout) and timeout > 0),
      do: "a positive number of milliseconds or nil"
  end

  defp problem(:run_in_executor, value), do: one_of([false, true, :process], value)
  defp problem(:on_error, value), do: one_of([:raise, :skip], value)
  defp problem(:on_non_finite, value), do: one_of([:raise, :skip, :zero], value)
  defp problem(:enabled, value), do: one_of([true, false], value)

  defp one_of(allowed, value) do
    unless value in allowed, do: "one of #{Enum.map_join(allowed, ", ", &inspect/1)}"
  end
end
