#!/usr/bin/perl
# A small web server, in Perl because that is in every Debian image: it greets, and tells what the machine knows of itself.
use strict;
use warnings;
use IO::Socket::INET;

sub first_line {
    my ($name) = @_;
    open my $file, '<', $name or return 'unknown';
    my $line = <$file> // '';
    chomp $line;
    return $line;
}

sub page {
    my ($uptime) = split ' ', first_line('/proc/uptime');
    my $boots = 0;
    if (open my $file, '<', 'boots') { $boots++ while <$file>; }
    return sprintf "%s: %s, boot number %d, up for %.0f s\n", $ENV{GREETING} // 'Hello', first_line('/proc/sys/kernel/hostname'), $boots, $uptime;
}

my $server = IO::Socket::INET->new(LocalPort => 8080, Listen => 16, ReuseAddr => 1) or die "cannot listen on port 8080: $!\n";
$| = 1;
$SIG{PIPE} = 'IGNORE';
print "listening on port 8080\n";
while (my $client = $server->accept) {
    while (my $line = <$client>) { last if $line =~ /^\r?$/ }
    my $text = page();
    print $client "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: " . length($text) . "\r\n\r\n$text";
    close $client;
}
