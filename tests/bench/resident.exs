defmodule Bench.Resident do
  @moduledoc """
  The resident memory of the BEAM and a worker, `[beam: bytes, python: bytes]`. Linux alone says it.
  """

  @doc "Both, of a pool with one worker, by the id of their process."
  def pids(pool) do
    {:ok, %{workers: [%{os_pid: python}]}} = Tinkex.CustomLoss.info(pool)
    [beam: System.pid(), python: python]
  end

  def now(pids), do: read(pids, "VmRSS")

  @doc "The most since `reset_most/1`."
  def most(pids), do: read(pids, "VmHWM")

  def reset_most(pids),
    do: for({_name, pid} <- pids, do: :ok = File.write("/proc/#{pid}/clear_refs", "5"))

  @doc "Once all processes but the caller are collected, and what that frees has gone back."
  def settled(pids) do
    for pid <- Process.list(), pid != self(), do: :erlang.garbage_collect(pid)
    Process.sleep(1_500)
    now(pids)
  end

  @doc "Bytes of the files that they share in memory, less those that the worker's has already."
  def shared(pids) do
    files =
      for {_name, pid} <- pids,
          descriptor <- Path.wildcard("/proc/#{pid}/fd/*"),
          match?({:ok, "/memfd:tinker_custom_loss" <> _}, File.read_link(descriptor)),
          {:ok, %{inode: inode, size: size}} <- [File.stat(descriptor)],
          uniq: true,
          do: {inode, size}

    size = for({_inode, size} <- files, do: size) |> Enum.sum()
    max(size - read(pids, "RssShmem")[:python], 0)
  end

  defp read(pids, key) do
    for {name, pid} <- pids do
      [_, kilobytes] = Regex.run(~r/#{key}:\s+(\d+) kB/, File.read!("/proc/#{pid}/status"))
      {name, 1024 * String.to_integer(kilobytes)}
    end
  end
end
