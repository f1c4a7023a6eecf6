defmodule Tinkex.CustomLoss.Test.Fuzz do
  @moduledoc "Mutated and random frames into the Elixir decoder, the same for the same seed."

  alias Tinkex.CustomLoss.Pool.Memory
  alias Tinkex.CustomLoss.Wire.{Frame, MessagePack, Protocol}
  alias Tinkex.CustomLoss.Test.{Terms, Vectors}

  @words div(256 * 1024 * 1024, 8)
  @interesting [
    <<0xFFFFFFFF::32>>,
    <<0x7FFFFFFF::32>>,
    <<0::32>>,
    <<0xC1>>,
    <<0xDD, 0xFFFFFFFF::32>>,
    <<0xDF, 0x80000000::32>>,
    <<0xC6, 0xFFFFFFFF::32>>,
    <<0xC7, 20, 1, 0::32, 0::64, 8::64>>,
    <<0xC7, 20, 1, 0::32, 4095::64, 2::64>>,
    <<0xC7, 20, 1, 1::32, 0::64, 8::64>>,
    <<0xC7, 20, 1, 0::32, 8::64, -1::64>>,
    <<0xC7, 20, 1, 0::32, -1::64, 1::64>>,
    <<0xC9, 0xFFFFFFFF::32, 0xFF>>,
    <<0xCB, 0x7FF8000000000000::64>>,
    <<0xCF, 0xFFFFFFFFFFFFFFFF::64>>
  ]

  @doc """
  Decodes `count` frames; returns how often each kind of message and of error came out.

  Anything else that comes of a frame, or more than 256 MiB of memory, ends the caller.
  """
  def run(count, seed) do
    Task.async(fn ->
      Process.flag(:max_heap_size, %{size: @words, kill: true, error_logger: true})
      Terms.seed(seed)
      known = known()
      memory = memory()

      Enum.reduce(1..count, %{}, fn _, seen ->
        Map.update(seen, one(known, memory), 1, &(&1 + 1))
      end)
    end)
    |> Task.await(:infinity)
  end

  defp known do
    (Vectors.messages() ++ Vectors.formats() ++ Vectors.invalid())
    |> Enum.map(& &1.frame)
    |> Enum.filter(&(byte_size(&1) < 4096))
    |> List.to_tuple()
  end

  # A page of one file, which the request of every id has that is likely in a frame.
  defp memory do
    path = Path.join(System.tmp_dir!(), "custom_loss_fuzz_#{System.pid()}")
    {:ok, file} = :file.open(path, [:raw, :binary, :read, :write])
    File.rm!(path)
    :ok = :file.pwrite(file, 0, <<0::4096-unit(8)>>)
    %{Memory.none() | files: %{0 => file}, taken: Map.new(0..255, &{&1, 0})}
  end

  defp one(known, memory) do
    known |> frame() |> Protocol.decode(&Memory.read(memory, &1, &2)) |> elem(0)
  rescue
    error ->
      reraise "#{Exception.message(error)}; the seed's state was #{inspect(:rand.export_seed())}",
              __STACKTRACE__
  end

  defp frame(known) do
    case :rand.uniform(10) do
      n when n <= 8 ->
        frame = elem(known, :rand.uniform(tuple_size(known)) - 1)
        frame = if :rand.uniform(5) == 1, do: placed(frame), else: frame
        times = elem({1, 1, 1, 2, 8}, :rand.uniform(5) - 1)
        Enum.reduce(1..times, frame, fn _, frame -> mutated(frame, known) end)

      9 ->
        :rand.bytes(:rand.uniform(200) - 1)

      10 ->
        op = Enum.random(["ready", "result", "error", "log"])
        fields = for key <- ~w(id error record terms level gradients), do: {key, Terms.term(1)}

        fields
        |> Enum.take_random(:rand.uniform(7) - 1)
        |> Map.new()
        |> Map.put("op", op)
        |> MessagePack.encode()
        |> IO.iodata_to_binary()
    end
  end

  # With a place where its payload was.
  defp placed(<<0xC6, size::32, _::binary-size(size), message::binary>>),
    do: Frame.encode_place({0, Enum.random([0, 0, 8, 5000]), size}) <> message

  defp placed(message), do: Frame.encode_place({Enum.random(0..1), 0, 8}) <> message

  defp mutated(frame, known) do
    size = byte_size(frame)
    at = :rand.uniform(size + 1) - 1
    gone = min(size - at, :rand.uniform(16) - 1)
    <<head::binary-size(at), cut::binary-size(gone), tail::binary>> = frame

    case :rand.uniform(7) do
      1 when tail != "" ->
        [head, :rand.uniform(256) - 1, binary_part(tail, 1, byte_size(tail) - 1)]

      2 ->
        [head, tail]

      3 ->
        [head, :rand.bytes(gone), cut, tail]

      4 ->
        head

      5 ->
        [head, Enum.random(@interesting), tail]

      6 ->
        [head, part(elem(known, :rand.uniform(tuple_size(known)) - 1))]

      _ ->
        [:binary.copy(Enum.random([<<0x91>>, <<0x81>>]), :rand.uniform(200)), frame]
    end
    |> IO.iodata_to_binary()
  end

  defp part(frame) do
    at = :rand.uniform(byte_size(frame) + 1) - 1
    binary_part(frame, at, byte_size(frame) - at)
  end
end
