defmodule Tinkex.CustomLoss.Output do
  @moduledoc """
  What a composed loss comes to.

    * `loss_total` - the loss, a float
    * `gradients` - ∂loss_total/∂logprobs: one tensor a datum, `[T]` or `[T, K]`, in the form in which
      its logprobs were given; nil if the call said `gradients: false`. Not negated: a training
      client is sent `weights = -gradient`.
    * `record` - the record of the step, a map with string keys (docs/record.md):
      `record["regularizers"]["kl"]["contribution"]`. Its gradient norms are with respect to
      logprobs.

  Non-finite numbers are the atoms `:nan`, `:infinity` and `:neg_infinity`.
  """

  @enforce_keys [:loss_total, :gradients, :record]
  defstruct [:loss_total, :gradients, :record]

  @type t :: %__MODULE__{
          loss_total: float() | :nan | :infinity | :neg_infinity,
          gradients: [Tinkex.CustomLoss.Wire.Tensor.t()] | nil,
          record: %{String.t() => term()}
        }

  @doc """
  The record in flat form, for loggers that take names and numbers.

  Keys such as `"regularizers/kl/value"`, all values floats: true and false are 1.0 and 0.0; nil,
  text and non-finite numbers are left out. A `:` in the name of a metric becomes `.`, since Tinker
  splits metric names there. With the option `:prefix`, every key begins with it and a `/`.

      iex> output = %Tinkex.CustomLoss.Output{
      ...>   loss_total: 1.5,
      ...>   gradients: nil,
      ...>   record: %{"loss_total" => 1.5, "base_loss" => %{"value" => 1, "error" => nil}}
      ...> }
      iex> Tinkex.CustomLoss.Output.flat(output)
      %{"base_loss/value" => 1.0, "loss_total" => 1.5}
      iex> Tinkex.CustomLoss.Output.flat(output, prefix: "train")
      %{"train/base_loss/value" => 1.0, "train/loss_total" => 1.5}
  """
  @spec flat(t() | map(), prefix: String.t()) :: %{String.t() => float()}
  def flat(record, options \\ [])
  def flat(%__MODULE__{record: record}, options), do: flat(record, options)

  def flat(record, options) when is_map(record) do
    prefix = options |> Keyword.validate!(prefix: "") |> Keyword.fetch!(:prefix)
    path = if prefix == "", do: [], else: [String.trim_trailing(prefix, "/")]
    Map.new(flatten(record, path))
  end

  defp flatten(map, path) when is_map(map),
    do: Enum.flat_map(map, fn {key, value} -> flatten(value, [key | path]) end)

  defp flatten(true, path), do: [{key(path), 1.0}]
  defp flatten(false, path), do: [{key(path), 0.0}]
  defp flatten(number, path) when is_number(number), do: [{key(path), number * 1.0}]
  defp flatten(_no_number, _path), do: []

  defp key(path), do: path |> Enum.reverse() |> Enum.join("/") |> String.replace(":", ".")

  @doc false
  # A number for people to read, to five digits.
  def figure(zero) when zero == 0, do: "0.0"

  def figure(number) when is_number(number) do
    magnitude = number |> abs() |> :math.log10() |> floor()

    if magnitude in -4..5,
      do: :erlang.float_to_binary(number * 1.0, [:compact, decimals: max(1, 4 - magnitude)]),
      else: :erlang.float_to_binary(number * 1.0, scientific: 4)
  end

  def figure(other), do: to_string(other)

  defimpl Inspect do
    import Inspect.Algebra

    alias Tinkex.CustomLoss.Wire.Numbers

    # 80, less the indentation.
    @columns 78
    @heads ["", "value", "weight", "contribution", "grad_norm", "cosine"]
    @keys ["value", "weight", "contribution", "grad_norm", "cosine_to_total"]

    def inspect(%{record: record} = output, opts) do
      regularizers = Enum.sort(record["regularizers"] || %{})
      base = if record["base_loss"], do: [{"base_loss", record["base_loss"]}], else: []
      {shown, more} = Enum.split(regularizers, limit(opts.limit))
      rows = for {name, record} <- base ++ shown, do: [label(name) | figures(record)]
      findings = for {name, record} <- base ++ shown, text <- findings(record), do: {name, text}
      rest = if more == [], do: [], else: ["… #{length(regularizers)} regularizers in all"]

      # What every row leaves empty is no column.
      table = if rows == [], do: [], else: [@heads | rows] |> Enum.zip_with(& &1)
      lines = table |> Enum.filter(&(tl(&1) |> Enum.any?(fn cell -> cell != "" end))) |> aligned()
      head = "loss_total: #{figure(output.loss_total)}, gradients: #{gradients(output.gradients)}"
      told = for {name, text} <- findings, do: shorten("#{label(name)}: #{text}", @columns)
      body = Enum.map([head | lines] ++ rest ++ told, &concat(line(), &1))
      concat(["#Tinkex.CustomLoss.Output<", nest(concat(body), 2), line(), ">"])
    end

    defp limit(:infinity), do: 1_000_000
    defp limit(limit), do: limit

    defp label(name), do: if(name =~ ~r/\A[\w.:-]+\z/u, do: name, else: Kernel.inspect(name))

    defp figures(record) do
      figures = for key <- @keys, do: figure(record[key])
      if record["skipped"], do: List.replace_at(figures, 0, "skipped"), else: figures
    end

    # What the figures do not say.
    defp findings(record) do
      zeroed = record["non_finite_zeroed"] || 0

      [
        record["zero_gradient"] == true && "its gradient is 0, it trained nothing",
        zeroed > 0 && "#{zeroed} non-finite gradient entries were replaced by 0",
        record["skipped"] == true && "skipped#{if error = record["error"], do: ": " <> error}"
      ]
      |> Enum.filter(& &1)
    end

    # In one line.
    defp shorten(text, width) do
      text = String.replace(text, ~r/\s+/, " ")
      if String.length(text) > width, do: String.slice(text, 0, width - 1) <> "…", else: text
    end

    defp figure(nil), do: ""
    defp figure(number), do: Tinkex.CustomLoss.Output.figure(number)

    # Lines of columns: the first to the left, numbers to the right.
    defp aligned([]), do: []

    defp aligned([labels | columns]) do
      taken = for column <- columns, do: 2 + (column |> Enum.map(&String.length/1) |> Enum.max())
      room = max(8, @columns - Enum.sum(taken))

      [Enum.map(labels, &shorten(&1, room)) | columns]
      |> Enum.with_index(fn column, index ->
        width = column |> Enum.map(&String.length/1) |> Enum.max()
        pad = if index == 0, do: &String.pad_trailing/2, else: &String.pad_leading/2
        Enum.map(column, &pad.(&1, width))
      end)
      |> Enum.zip_with(&(&1 |> Enum.join("  ") |> String.trim_trailing()))
    end

    defp gradients(nil), do: "nil"
    defp gradients(gradients), do: shapes(gradients)

    # Shapes, never data.
    defp shapes(gradients) do
      {shown, more} = Enum.split(gradients, 3)
      shown = Enum.map(shown, &Kernel.inspect(shape(&1), charlists: :as_lists))
      rest = if more == [], do: [], else: ["… #{length(gradients)} in all"]
      "[" <> Enum.join(shown ++ rest, ", ") <> "]"
    end

    defp shape([row | _] = rows) when is_list(row), do: [length(rows) | shape(row)]
    defp shape(values) when is_list(values), do: [length(values)]
    defp shape({_bytes, shape}), do: shape(%{shape: shape})
    defp shape({_bytes, shape, _dtype}), do: shape(%{shape: shape})
    defp shape(%{"logprobs" => tensor}), do: shape(tensor)
    defp shape(%{logprobs: tensor}), do: shape(tensor)
    defp shape(%{shape: shape}) when is_tuple(shape), do: Tuple.to_list(shape)
    defp shape(%{shape: shape}) when is_list(shape), do: shape
    defp shape(%{"shape" => shape}) when is_list(shape), do: shape
    defp shape(%{data: bytes} = map) when is_binary(bytes), do: count(bytes, map[:dtype])
    defp shape(%{"data" => bytes} = map) when is_binary(bytes), do: count(bytes, map["dtype"])
    defp shape(%{data: values}), do: shape(values)
    defp shape(%{"data" => values}), do: shape(values)

    defp count(bytes, dtype) do
      {:ok, dtype} = Numbers.dtype(dtype || :float32)
      [div(byte_size(bytes), Numbers.size(dtype))]
    end
  end
end
