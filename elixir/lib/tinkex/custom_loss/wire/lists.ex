defmodule Tinkex.CustomLoss.Wire.Lists do
  @moduledoc false
  # The bytes of tensors as nested lists of numbers.
  #
  # A list takes eight times its bytes of float32, and a heap that grows to hold it is copied again
  # and again, with all that the caller keeps there: for a million numbers that takes four times as
  # long as to make them. So many are made in processes of their own, which begin with room for them.

  alias Tinkex.CustomLoss.Wire.{Batch, Numbers}

  # Numbers. For fewer a process costs more than it saves. The lists of one are there twice while they
  # are sent: one after another, each with few of a large batch, so that this is little.
  @few 32_768
  @most 131_072

  # Of each number: its cell, itself, and on the stack what waits for the rest of its list.
  @words 6

  @doc "Of each `{bytes, shape}` the list of that shape; where there is no shape, the bytes."
  @spec of([{binary() | nil, Batch.shape() | nil}], Numbers.dtype()) :: [list() | binary() | nil]
  def of(tensors, dtype) do
    if count(tensors, 0) < @few,
      do: nest_all(tensors, dtype),
      else: tensors |> groups([], 0) |> Enum.flat_map(&made_elsewhere(&1, dtype))
  end

  defp count([{_bytes, shape} | rest], sum), do: count(rest, sum + Batch.count(shape))
  defp count([], sum), do: sum

  defp groups([{_bytes, shape} = tensor | rest], group, count) do
    count = count + Batch.count(shape)

    if count < @most,
      do: groups(rest, [tensor | group], count),
      else: [{Enum.reverse(group, [tensor]), count} | groups(rest, [], 0)]
  end

  defp groups([], group, count), do: [{Enum.reverse(group), count}]

  defp made_elsewhere({tensors, count}, dtype) do
    caller = self()
    tag = make_ref()
    make = fn -> send(caller, {tag, nest_all(tensors, dtype)}) end
    {_, monitor} = :erlang.spawn_opt(make, [:monitor, min_heap_size: @words * count])

    receive do
      {^tag, lists} ->
        Process.demonitor(monitor, [:flush])
        lists

      {:DOWN, ^monitor, _, _, reason} ->
        exit(reason)
    end
  end

  defp nest_all([{bytes, nil} | rest], dtype), do: [bytes | nest_all(rest, dtype)]

  defp nest_all([{bytes, shape} | rest], dtype),
    do: [nest(bytes, shape, dtype) | nest_all(rest, dtype)]

  defp nest_all([], _dtype), do: []

  defp nest(bytes, [_], dtype), do: Numbers.unpack(bytes, dtype)
  defp nest(_bytes, [0 | _], _dtype), do: []

  defp nest(bytes, [rows | shape], dtype) do
    row = div(byte_size(bytes), rows)
    for i <- 0..(rows - 1), do: nest(binary_part(bytes, i * row, row), shape, dtype)
  end
end
