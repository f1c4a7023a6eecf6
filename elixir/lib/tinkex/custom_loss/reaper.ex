defmodule Tinkex.CustomLoss.Reaper do
  @moduledoc false
  # Ends the operating system's processes of a pool, with all their children, whatever they do.
  #
  # A closed port is only an end of file to Python, and code that holds its interpreter's lock never
  # looks. Workers are therefore killed from outside: on request, and when the Erlang process of a
  # worker ends in any way. This process starts before the workers and ends after them.

  use GenServer

  def start_link(supervisor), do: GenServer.start_link(__MODULE__, supervisor)

  @doc "The reaper among the children of `supervisor`."
  def whereis(supervisor), do: :persistent_term.get({__MODULE__, supervisor})

  @doc "Ends the process group of `os_pid` when the calling process ends."
  def watch(reaper, os_pid), do: GenServer.cast(reaper, {:watch, self(), os_pid})

  @doc "Ends the process group of `os_pid`, which the calling process had watched, now."
  def kill(reaper, os_pid), do: GenServer.cast(reaper, {:kill, self(), os_pid})

  @impl true
  def init(supervisor) do
    Process.flag(:trap_exit, true)
    :persistent_term.put({__MODULE__, supervisor}, self())
    {:ok, %{supervisor: supervisor, watched: %{}}}
  end

  @impl true
  def handle_cast({:watch, owner, os_pid}, state),
    do: {:noreply, put_in(state.watched[owner], {Process.monitor(owner), os_pid})}

  def handle_cast({:kill, owner, os_pid}, state) do
    sigkill([os_pid])

    case state.watched do
      %{^owner => {monitor, ^os_pid}} ->
        Process.demonitor(monitor, [:flush])
        {:noreply, %{state | watched: Map.delete(state.watched, owner)}}

      _ended_before ->
        {:noreply, state}
    end
  end

  @impl true
  def handle_info({:DOWN, _monitor, :process, owner, _reason}, state) do
    {{_monitor, os_pid}, watched} = Map.pop!(state.watched, owner)
    sigkill([os_pid])
    {:noreply, %{state | watched: watched}}
  end

  def handle_info({:EXIT, _pid, _reason}, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state) do
    sigkill(for {_owner, {_monitor, os_pid}} <- state.watched, do: os_pid)
    :persistent_term.erase({__MODULE__, state.supervisor})
  end

  defp sigkill([]), do: :ok

  # The kill of the shell, because a container need not have the program. A negative number is that
  # of a process group: the worker and what it started, also after the worker itself is gone. There
  # is nothing left to do if the group does not exist any more.
  defp sigkill(os_pids) do
    groups = Enum.map(os_pids, &"-#{&1}")
    System.cmd("/bin/sh", ["-c", ~s(kill -KILL "$@"), "kill" | groups], stderr_to_stdout: true)
    :ok
  end
end
