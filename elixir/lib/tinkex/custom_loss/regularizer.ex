defmodule Tinkex.CustomLoss.Regularizer do
  alias Tinkex.CustomLoss.Schema

  @schema [
    name: [
      type: :label,
      doc:
        "a string or atom, unique within the call; it names the term in the record and errors, \
as a string. By default the name of the function: `\"topology\"` for `\"my_losses:topology\"`."
    ],
    fn: [
      type: :term,
      required: true,
      doc: "what computes it: `:l2`, or any other built-in term, or `\"my_losses:topology\"`, a \
function of a module that the pool was started with (`:load`). See `Tinkex.CustomLoss.terms/1` for \
what there is."
    ],
    weight: [
      type: :weight,
      required: true,
      doc: "a finite number of either sign, or a function that gives one for the call's `:step`: \
`fn step -> 0.1 * min(1.0, step / 100) end`. The function runs in the calling process, before \
anything is sent."
    ],
    params: [
      type: :params,
      default: %{},
      doc:
        "a map or keyword list: keyword arguments of the function. An atom among them is sent as \
a string, so that `estimator: :k3` is `estimator=\"k3\"`."
    ],
    reduction: Schema.reduction(),
    run_in_executor: [
      type: {:in, [false, true, :process]},
      default: false,
      doc:
        "`true`: in a thread, so that a slow term does not keep the others waiting. `:process`: \
in another process, from which a timeout can really end it."
    ],
    timeout: [
      type: :milliseconds,
      doc: "milliseconds for this term. Without one, a term that hangs takes the whole call's \
deadline, and its worker, with it."
    ],
    on_error: [
      type: {:in, [:raise, :skip]},
      default: :raise,
      doc:
        "`:raise` fails the call with a `Tinkex.CustomLoss.TermError`; `:skip` leaves the term \
out and says so in the record."
    ],
    on_non_finite: [
      type: {:in, [:raise, :skip, :zero]},
      default: :raise,
      doc: "when its loss or gradient is nan or infinite: `:raise`, `:skip` the term, or `:zero` \
the entries."
    ],
    enabled: [type: {:in, [true, false]}, default: true, doc: "`false` leaves it out."]
  ]

  @moduledoc """
  A named, weighted term of the loss: `loss_total = base_loss + Σ weight · loss`.

  Wherever regularizers are taken, so are maps and keyword lists with these keys, as atoms or strings:

  #{Schema.docs(@schema)}
  """

  @enforce_keys for {key, option} <- @schema, option[:required], do: key
  defstruct for {key, option} <- @schema, do: {key, option[:default]}

  @type t :: %__MODULE__{
          name: String.t(),
          fn: String.t(),
          weight: number() | (non_neg_integer() -> number()),
          params: %{(atom() | String.t()) => term()},
          reduction: String.t() | nil,
          run_in_executor: boolean() | :process,
          timeout: pos_integer() | nil,
          on_error: :raise | :skip,
          on_non_finite: :raise | :skip | :zero,
          enabled: boolean()
        }

  @doc """
  A regularizer from a map, keyword list or struct.

  Raises `ArgumentError` that names the regularizer, the key, and what is allowed:

      iex> Tinkex.CustomLoss.Regularizer.new!(name: "kl", fn: :kl, weight: :heavy)
      ** (ArgumentError) invalid value for :weight of regularizer "kl": expected a finite number, or a function of the step, got: :heavy
  """
  @spec new!(t() | map() | keyword()) :: t()
  def new!(%__MODULE__{} = regularizer) do
    # What a struct leaves out is nil.
    regularizer |> Map.from_struct() |> Map.reject(fn {_, value} -> value == nil end) |> new!()
  end

  def new!(given) do
    options = Schema.validate_map!(given, @schema, "a regularizer", label(given))
    struct!(__MODULE__, %{options | name: options.name || own_name(options.fn)})
  end

  defp own_name(fun), do: fun |> String.split(":") |> List.last()

  # How to speak of it, whatever is wrong with it.
  defp label(given) do
    given = if(is_map(given), do: Map.to_list(given), else: given)

    with {:expected, _} <- Schema.cast(:label, find(given, :name)),
         {:expected, _} <- Schema.cast(:term, find(given, :fn)) do
      "a regularizer"
    else
      {:ok, name} -> "regularizer #{inspect(own_name(name))}"
    end
  end

  defp find(given, option) do
    if Schema.proper?(given),
      do:
        Enum.find_value(given, fn pair ->
          with {key, value} <- pair,
               true <- key in [option, "#{option}"],
               do: value,
               else: (_ -> nil)
        end)
  end

  @doc """
  Regularizers from a list, whose names must differ.
  """
  @spec list!([t() | map() | keyword()]) :: [t()]
  def list!(given) do
    unless Schema.proper?(given),
      do: raise(ArgumentError, "expected :regularizers to be a list, got: #{inspect(given)}")

    if given != [] and Keyword.keyword?(given),
      do: raise(ArgumentError, "expected :regularizers to be a list of regularizers, got one")

    regularizers = Enum.map(given, &new!/1)
    names = Enum.map(regularizers, & &1.name)

    with [name | _] <- names -- Enum.uniq(names) do
      raise ArgumentError,
            "two regularizers are named #{inspect(name)}; names tell them apart in the record: " <>
              "give each its own :name"
    end

    regularizers
  end

  @doc """
  The regularizer with the weight that it has at a step.

  A function is called with the step, here and now. Raises `ArgumentError` if it gives no finite
  number, and if the step is nil, which is not known.
  """
  @spec at_step(t(), non_neg_integer() | nil) :: t()
  def at_step(%__MODULE__{weight: weight} = regularizer, nil) when is_function(weight) do
    raise ArgumentError,
          "the weight of #{label(regularizer)} is a function of the step: say which step it is, with :step"
  end

  def at_step(%__MODULE__{weight: weight} = regularizer, step) when is_function(weight) do
    case weight.(step) do
      number when is_number(number) ->
        %{regularizer | weight: number}

      other ->
        raise ArgumentError,
              "the weight of #{label(regularizer)} at step #{step} is #{inspect(other)}; " <>
                "expected the function to give a finite number"
    end
  end

  def at_step(regularizer, _step), do: regularizer

  @doc false
  # What the protocol says of a regularizer, which counts in seconds.
  def to_wire(%__MODULE__{} = regularizer) do
    regularizer
    |> Map.from_struct()
    |> Map.update!(:timeout, &(&1 && &1 / 1000))
  end
end
