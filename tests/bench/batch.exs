defmodule Bench.Batch do
  @moduledoc """
  A batch of random float32 binaries, and the two losses that are computed of it: one L2 term, and
  the work people do: nll + l2 + entropy + kl. A third of each datum is prompt, with weight 0.
  """

  defstruct [:logprobs, :weights, :reference, :length]

  def new(values, datums \\ 8) do
    length = div(values, datums)
    prompt = div(length, 3)
    weights = floats(prompt, 0.0) <> floats(length - prompt, 1.0)
    random = random(2 * length)

    %__MODULE__{
      length: length,
      logprobs: for(index <- 1..datums, do: cut(random, 31 * index, length)),
      weights: for(_ <- 1..datums, do: :binary.copy(weights)),
      reference: for(index <- 1..datums, do: cut(random, 37 * index + 1, length))
    }
  end

  @doc "What `Tinkex.CustomLoss.compute/4` takes."
  def logprobs(batch), do: for(part <- batch.logprobs, do: {part, [batch.length]})

  def data(_batch, :l2), do: nil

  def data(batch, :work) do
    for {weights, reference} <- Enum.zip(batch.weights, batch.reference) do
      inputs = %{
        weights: {weights, [batch.length]},
        reference_logprobs: {reference, [batch.length]}
      }

      %{loss_fn_inputs: inputs}
    end
  end

  def options(:l2), do: [regularizers: [%{name: "l2", fn: :l2, weight: 1.0}]]

  def options(:work) do
    [
      base_loss: :nll,
      regularizers: [
        %{name: "l2", fn: :l2, weight: 0.1},
        %{name: "entropy", fn: :entropy, weight: 0.01},
        %{name: "kl", fn: :kl, weight: 0.1}
      ]
    ]
  end

  @doc "What `Bench.HandPort.compute/2` takes."
  def arrays(batch, :l2), do: [batch.logprobs]
  def arrays(batch, :work), do: [batch.logprobs, batch.weights, batch.reference]

  @doc "The numbers of a binary."
  def list(binary), do: for(<<x::float-32-little <- binary>>, do: x)

  # A binary of its own, as it comes from a client, and no part of a larger one.
  defp cut(random, from, length),
    do: random |> binary_part(4 * rem(from, length), 4 * length) |> :binary.copy()

  defp floats(count, value), do: :binary.copy(<<value::float-32-little>>, count)

  # Enough of them that a processor does not learn them by heart, repeated.
  defp random(count) do
    once = min(count, 65_536)
    floats = for _ <- 1..once, into: <<>>, do: <<-abs(:rand.normal())::float-32-little>>
    floats |> :binary.copy(div(count, once) + 1) |> binary_part(0, 4 * count)
  end
end
